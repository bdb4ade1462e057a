"""What the Nix tests share: one evaluation of all cases, and flakes in place of the inputs."""

from __future__ import annotations

import functools
import shutil
import subprocess
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
def input_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nix' arguments that put a stand-in for every input of the flake, so that nothing is fetched."""
    corepkgs, library = STAND_INS / "corepkgs", STAND_INS / "nixpkgs-lib"
    if not (corepkgs.is_dir() and library.is_dir()):
        pytest.skip(f"there is no trimmed package set (looked in {corepkgs} and {library})")
    folder = tmp_path_factory.mktemp("flakes")
    inputs = {name: folder / name for name in ("nixpkgs", "nixpkgs-cuda")}
    for name, path in inputs.items():
        shutil.copytree(Path(__file__).parent / "stand-in" / name, path)
        for file in path.rglob("*.nix"):
            text = file.read_text().replace("@corepkgs@", str(corepkgs)).replace("@lib@", str(library / "lib"))
            file.write_text(text.replace("@repository@", str(REPOSITORY)))
    inputs["colmena"] = STAND_INS / "colmena"
    if not inputs["colmena"].is_dir():
        pytest.skip(f"there is no checkout of Colmena (looked in {inputs['colmena']})")
    return [part for name, path in inputs.items() for part in ("--override-input", name, f"path:{path}")]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows of, without the environments and caches beside them, which Nix would copy into its store."""
    folder = tmp_path_factory.mktemp("source")
    if shutil.which("git") is None:
        pytest.skip("git is not on PATH (Debian: apt install git)")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(lambda name: (REPOSITORY / name).is_file(), listing.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def nix_command() -> Any:
    """A function that runs the new-style `nix` offline and returns its result."""

    def run(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
        command = ("nix", "--extra-experimental-features", "nix-command flakes", "--offline")
        return nix(*command, *arguments, folder=folder)

    return run
