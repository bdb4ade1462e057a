"""Resolve the workspace and write the three files that are committed of it.

`requirements.lock` (both packages) and `requirements-dev.lock` (the tools on top) are pip's own format with hashes and
no addresses. `wheels.json` names, for Nix (CPython 3.12, x86_64 manylinux), the one wheel of every package and which
environment needs it. All three come from one resolution, the uv.lock beside them, which is not committed because it
records registry addresses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
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


def main() -> int:
    """Write the locks with the uv that the first argument names."""
    uv = sys.argv[1] if len(sys.argv) > 1 else "uv"
    run(uv, "lock", "--quiet")
    runtime = export(uv, "--all-packages", "--all-extras", "--no-dev", "--group", "build")
    development = export(uv, "--only-group", "dev")
    write("requirements.lock", runtime)
    write("requirements-dev.lock", development)
    resolution = tomllib.loads((WORKSPACE / "uv.lock").read_text())
    environments = {
        name: requirement_names(export(uv, *arguments, "--no-dev")) for name, arguments in ENVIRONMENTS.items()
    }
    wheels = nix_wheels(resolution, set().union(*environments.values()))
    content = {"python": NIX_PYTHON, "environments": environments, "wheels": wheels}
    write("wheels.json", json.dumps(content, indent=1) + "\n")
    return 0


def run(*command: str) -> str:
    """Run a command in the workspace and return what it printed."""
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    return subprocess.run(command, cwd=WORKSPACE, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def export(uv: str, *selection: str) -> str:
    """Return the locked requirements of a selection of the workspace, without addresses."""
    return run(uv, "export", "--quiet", "--frozen", "--no-emit-workspace", "--no-annotate", "--no-header", *selection)


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
