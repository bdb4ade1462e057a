"""Every Nix file parses, is formatted and lint-free; the locks agree with what they lock."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.nix


def nix_files(repository: Path) -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("git is not on PATH (Debian: apt install git)")
    listing = subprocess.run(["git", "ls-files", "*.nix"], cwd=repository, capture_output=True, text=True, check=True)
    return listing.stdout.split()


def test_every_file_parses(repository: Path, run_nix: Any) -> None:
    for file in nix_files(repository):
        result = run_nix("nix-instantiate", "--parse", file)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["nixfmt", "--check"], ["deadnix", "--fail"]], ids=["nixfmt", "deadnix"])
def test_files_are_clean(repository: Path, run_nix: Any, command: list[str]) -> None:
    result = run_nix(*command, *nix_files(repository))
    assert result.returncode == 0, result.stdout + result.stderr


def test_statix_finds_nothing(repository: Path, run_nix: Any) -> None:
    """File by file: it takes one path a call, and in a folder it would go through what git does not know of too."""
    results = [run_nix("statix", "check", "--format", "errfmt", file) for file in nix_files(repository)]
    assert [result.stdout + result.stderr for result in results if result.returncode] == []


def test_flake_lock_names_the_inputs_of_the_flake(repository: Path, run_nix: Any) -> None:
    """The lock has a node for every input, with the input's own address, and no other node."""
    result = run_nix("nix-instantiate", "--eval", "--strict", "--json", "-E", "(import ./flake.nix).inputs")
    inputs = json.loads(result.stdout)
    lock = json.loads((repository / "flake.lock").read_text())
    nodes = lock["nodes"]
    assert nodes["root"]["inputs"] == {name: name for name in inputs}
    assert set(nodes) == {"root", *inputs}
    for name, declared in inputs.items():
        original = nodes[name]["original"]
        reference = "/".join(filter(None, [original["owner"], original["repo"], original.get("ref")]))
        assert declared["url"] == f"{original['type']}:{reference}"
        assert nodes[name].get("flake", True) == declared.get("flake", True)
        locked = nodes[name]["locked"]
        assert (locked["owner"], locked["repo"]) == (original["owner"], original["repo"])
        assert re.fullmatch(r"[0-9a-f]{40}", locked["rev"])
        assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", locked["narHash"])


def test_wheels_are_those_of_the_requirements(repository: Path) -> None:
    """Every wheel that Nix fetches has its version and digest in the lock that pip installs from."""
    wheels = json.loads((repository / "python" / "wheels.json").read_text())["wheels"]
    requirements = (repository / "python" / "requirements.lock").read_text().replace("\\\n", " ")
    locked: dict[tuple[str, str], str] = {}
    for line in requirements.splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line)
        assert match, line
        locked[match.group(1), match.group(2)] = line
    for name, wheel in wheels.items():
        assert f"sha256:{wheel['sha256']}" in locked[name, wheel["version"]], name


def test_every_environment_names_known_wheels(repository: Path) -> None:
    document = json.loads((repository / "python" / "wheels.json").read_text())
    for name, members in document["environments"].items():
        assert set(members) <= document["wheels"].keys(), name
    assert not {"torch", "sglang", "transformers", "numpy"} & set(document["environments"]["pascaline"])
    assert {"torch", "sglang", "triton"} <= set(document["environments"]["engine"])
