"""What the Nix tests share: one evaluation of all cases, and flakes that stand for the inputs."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.nix import REPOSITORY, STAND_INS, evaluate, nix


@pytest.fixture(scope="session")
def evaluated() -> Any:
    """A function from an attribute of evaluate.nix to its value, evaluated once a session."""
    return functools.cache(evaluate)


@pytest.fixture(scope="session")
def run_nix() -> Any:
    """The function `nix`."""
    return nix


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def nixpkgs_stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Flakes that stand for the inputs nixpkgs and nixpkgs-cuda: nixpkgs' lib, and a trimmed package set."""
    corepkgs, library = STAND_INS / "corepkgs", STAND_INS / "nixpkgs-lib"
    if not (corepkgs.is_dir() and library.is_dir()):
        pytest.skip(f"no trimmed package set is at hand (looked in {corepkgs} and {library})")
    folder = tmp_path_factory.mktemp("flakes")
    for name in ("nixpkgs", "nixpkgs-cuda"):
        shutil.copytree(Path(__file__).parent / "stand-in" / name, folder / name)
        for file in (folder / name).glob("*.nix"):
            text = file.read_text().replace("@corepkgs@", str(corepkgs)).replace("@lib@", str(library / "lib"))
            file.write_text(text.replace("@repository@", str(REPOSITORY)))
    return {name: folder / name for name in ("nixpkgs", "nixpkgs-cuda")}
