"""What the Nix tests share: nixpkgs' lib, a trimmed package set where there is one, and one evaluation of all cases.

Both are looked for in $PASCALINE_NIX_STAND_INS, else in the user's cache folder (pascaline/nix): `nixpkgs-lib/lib` is
nixpkgs' own lib, `corepkgs` a trimmed nixpkgs whose pins name `nix-lib`. Tests that need what is not there are skipped.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = Path(
    os.environ.get("PASCALINE_NIX_STAND_INS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascaline" / "nix"
)


def tool(name: str) -> str:
    """Return a program's path, from PATH or the stand-ins' own bin folder, or skip the test."""
    found = shutil.which(name, path=f"{STAND_INS / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not on this machine")
    return found


def nix(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the Nix programs in the repository, without network or user configuration."""
    command = [tool(arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def evaluate(attribute: str) -> Any:
    """Return an attribute of evaluate.nix as plain data."""
    library = STAND_INS / "nixpkgs-lib" / "lib"
    if not library.is_dir():
        pytest.skip(f"nixpkgs' lib is not at hand (looked in {library})")
    arguments = [
        "--eval",
        "--strict",
        "--json",
        "tests/nix/evaluate.nix",
        "--argstr",
        "libPath",
        str(library),
        "-A",
        attribute,
    ]
    result = nix("nix-instantiate", *arguments)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)


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
