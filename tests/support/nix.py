"""Nix for the tests: its programs, and our modules evaluated without NixOS.

nixpkgs' lib and a trimmed package set are looked for in $PASCALINE_NIX_STAND_INS, else in the user's cache folder
(pascaline/nix): `nixpkgs-lib/lib` is nixpkgs' own lib, `corepkgs` a trimmed nixpkgs whose pins name `nix-lib`, `bin` may
hold nixfmt, statix and deadnix. Tests that need what is not there are skipped.

$PASCALINE_NIXPKGS names a folder with a whole nixpkgs (its `lib`, its `nixos`, and a package set as its default.nix). Then every case
is evaluated by NixOS' own modules instead of the stand-ins, to a system if it must be one.
"""

from __future__ import annotations

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

NIXPKGS = Path(os.environ["PASCALINE_NIXPKGS"]).resolve() if os.environ.get("PASCALINE_NIXPKGS") else None
"""A nixpkgs whose own modules the cases are evaluated with; None: the stand-ins serve."""
TIMEOUT = 3600 if NIXPKGS else 300
"""Seconds: a system takes seconds of its own, and there are dozens."""


def tool(name: str) -> str:
    """Return a program's path, from PATH or the stand-ins' own bin folder, or skip the test."""
    found = shutil.which(name, path=f"{STAND_INS / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is neither on PATH nor in {STAND_INS / 'bin'}")
    return found


def nix(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run one of the Nix programs, in the repository unless told otherwise."""
    command = [tool(arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def evaluate(attribute: str, *arguments: str) -> Any:
    """Return an attribute of tests/nix/evaluate.nix as plain data; RuntimeError says what Nix said."""
    library = (NIXPKGS or STAND_INS / "nixpkgs-lib") / "lib"
    if not library.is_dir():
        pytest.skip(f"nixpkgs' lib is not available (looked in {library})")
    options = ["--argstr", "libPath", str(library), *arguments, "-A", attribute]
    if NIXPKGS:
        options += ["--argstr", "nixpkgs", str(NIXPKGS)]
    result = nix("nix-instantiate", "--eval", "--strict", "--json", "tests/nix/evaluate.nix", *options)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)
