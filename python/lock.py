"""Resolve the workspace's requirements and write the three files that are committed.

`requirements.lock` (all packages) and `requirements-dev.lock` (the tools on top) are pip's own format with hashes and
no addresses. `wheels.json` names, for Nix (CPython 3.12, x86_64 manylinux), the one wheel of every package and which
environment needs it. All three come from one resolution, a uv.lock in a temporary folder, which is not committed
because it records registry addresses.

A package keeps the version that the locks hold, so that adding one does not move the others. `--upgrade NAME` (may be
repeated) lets go of one, `--upgrade-all` of all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

WORKSPACE = Path(__file__).resolve().parent
NIX_PYTHON = "3.12"
# Environments of python/default.nix: the control plane, the same with the built-in model or the router, the engine.
ENVIRONMENTS = {
    "pascaline": ["--package", "pascaline"],
    "builtin": ["--package", "pascaline", "--extra", "builtin"],
    "router": ["--package", "pascaline", "--extra", "router"],
    "engine": ["--package", "sglang-pascal"],
}


LOCKS = {"requirements.lock": ["--all-packages", "--all-extras", "--no-dev", "--group", "build"]}
LOCKS["requirements-dev.lock"] = ["--only-group", "dev"]


def main() -> int:
    """Write the locks with the uv that the first argument names."""
    try:
        write_locks(parse_arguments())
    except ResolutionError as error:
        raise SystemExit(f"lock.py: {error}") from error
    return 0


def write_locks(arguments: argparse.Namespace) -> None:
    """Resolve once, and write the three files from it."""
    with tempfile.TemporaryDirectory() as name:
        workspace = Workspace(Path(name), arguments.uv)
        workspace.lock([] if arguments.upgrade_all else locked_versions(set(arguments.upgrade)))
        for lock, selection in LOCKS.items():
            write(lock, workspace.export(*selection))
        resolution = tomllib.loads((workspace.folder / "uv.lock").read_text())
        environments = {
            name: requirement_names(workspace.export(*selection, "--no-dev"))
            for name, selection in ENVIRONMENTS.items()
        }
    wheels = nix_wheels(resolution, set().union(*environments.values()))
    content = {"python": NIX_PYTHON, "environments": environments, "wheels": wheels}
    write("wheels.json", json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="./dev lock", description=__doc__)
    parser.add_argument("uv", help="the uv program (./dev lock fills it in)")
    parser.add_argument(
        "--upgrade", action="append", default=[], metavar="NAME", help="take the newest version of NAME"
    )
    parser.add_argument("--upgrade-all", action="store_true", help="take the newest version of every package")
    return parser.parse_args()


def locked_versions(let_go: set[str]) -> list[str]:
    """Return the requirements of the committed locks, without the packages to let go of."""
    lines = [line for lock in LOCKS for line in (WORKSPACE / lock).read_text().splitlines() if "==" in line]
    requirements = [constraint(line) for line in lines]
    return [requirement for requirement in requirements if requirement.split("==")[0] not in let_go]


def constraint(line: str) -> str:
    """Return a lock's line as name, version and Python versions; other markers would split the resolution."""
    requirement, _, marker = line.removesuffix("\\").partition(" ; ")
    versions = re.findall(r"python_full_version [<>=]+ '[0-9.]+'", marker)
    return requirement.strip() + (f" ; {' and '.join(versions)}" if versions else "")


class ResolutionError(Exception):
    """uv finds no versions that fit together; the text is what it says."""


class Workspace:
    """A copy of the workspace's metadata in a folder of its own, where uv may write its lock."""

    def __init__(self, folder: Path, uv: str, source: Path = WORKSPACE) -> None:
        """Copy what uv reads to resolve."""
        self.folder, self._uv, self._source = folder, uv, source
        for file in source.glob("*/pyproject.toml"):
            (folder / file.parent.name).mkdir()
            shutil.copy(file, folder / file.parent.name)

    def lock(self, constraints: list[str]) -> None:
        """Resolve; each constraint is a requirement that holds for the package if it is needed at all."""
        text = (self._source / "pyproject.toml").read_text()
        table = "[tool.uv]\n"
        if table not in text:
            raise SystemExit("lock.py: python/pyproject.toml has no table [tool.uv]")
        constrained = f"{table}constraint-dependencies = {json.dumps(constraints)}\n"
        (self.folder / "pyproject.toml").write_text(text.replace(table, constrained))
        self._run("lock", "--quiet")

    def export(self, *selection: str) -> str:
        """Return the locked requirements of a selection of the workspace, without addresses."""
        return self._run(
            "export", "--quiet", "--frozen", "--no-emit-workspace", "--no-annotate", "--no-header", *selection
        )

    def _run(self, *arguments: str) -> str:
        environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
        command = [self._uv, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ResolutionError(done.stderr)
        return done.stdout


def requirement_names(requirements: str) -> list[str]:
    """Return the package names of a requirements file that apply to the Nix interpreter, sorted."""
    names = set()
    for line in requirements.splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==", line)
        if match and applies(line):
            names.add(match.group(1))
    return sorted(names)


def applies(requirement: str) -> bool:
    """Tell whether a requirement's Python version marker holds for the Nix interpreter."""
    bound = re.search(r"python_full_version (<|>=) '([0-9.]+)'", requirement)
    if bound is None:
        return True
    operator, version = bound.groups()
    older = version_tuple(NIX_PYTHON) < version_tuple(version)
    return older if operator == "<" else not older


def version_tuple(version: str) -> tuple[int, ...]:
    """Turn a dotted version into numbers that compare."""
    return tuple(int(part) for part in version.split("."))


def nix_wheels(resolution: dict[str, Any], names: set[str]) -> dict[str, dict[str, str]]:
    """Return name -> version, file and sha256 of the wheel that the Nix interpreter installs."""
    wheels = {}
    for package in resolution["package"]:
        if package["name"] not in names or not resolves_for_nix(package):
            continue
        file, digest = best_wheel(package)
        wheels[package["name"]] = {"version": package["version"], "file": file, "sha256": digest}
    missing = names - wheels.keys()
    if missing:
        raise SystemExit(
            f"lock.py: no wheel for CPython {NIX_PYTHON} on x86_64 manylinux: " + ", ".join(sorted(missing))
        )
    return dict(sorted(wheels.items()))


def resolves_for_nix(package: dict[str, Any]) -> bool:
    """Tell whether this of a package's several locked versions is the Nix interpreter's."""
    markers = package.get("resolution-markers", [])
    return not markers or any(applies(marker) for marker in markers)


def best_wheel(package: dict[str, Any]) -> tuple[str, str]:
    """Return file name and sha256 of the most specific wheel that fits."""
    fitting = []
    for wheel in package.get("wheels", []):
        file = wheel["url"].rsplit("/", 1)[-1]
        rank = wheel_rank(file)
        if rank:
            fitting.append((rank, file, wheel["hash"].removeprefix("sha256:")))
    if not fitting:
        wanted = f"{package['name']} {package['version']}"
        raise SystemExit(f"lock.py: {wanted} has no wheel for CPython {NIX_PYTHON} on x86_64 manylinux")
    _, file, digest = max(fitting)
    return file, digest


def wheel_rank(file: str) -> int:
    """Return 0 where a wheel does not fit, else more the closer its tags are to the Nix interpreter."""
    python, abi, platform = file.removesuffix(".whl").rsplit("-", 3)[1:]
    interpreter = "cp" + NIX_PYTHON.replace(".", "")
    if platform != "any" and not ("linux" in platform and "x86_64" in platform and "musl" not in platform):
        return 0
    if abi == interpreter:
        return 3
    minor = (int(interpreter[3:]),)
    if abi == "abi3" and any(version_tuple(t[3:]) <= minor for t in python.split(".") if t.startswith("cp3")):
        return 2
    return 1 if abi == "none" and ("py3" in python.split(".") or interpreter in python.split(".")) else 0


def write(name: str, text: str) -> None:
    """Write a file of the workspace, after making sure that it holds no address."""
    if "://" in text:
        raise SystemExit(f"lock.py: {name} would hold an address: {text[text.index('://') - 20 :][:80]!r}")
    (WORKSPACE / name).write_text(text)
    print(f"wrote python/{name}")


if __name__ == "__main__":
    sys.exit(main())
