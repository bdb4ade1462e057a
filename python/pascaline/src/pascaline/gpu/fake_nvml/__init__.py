"""A shared library with NVML's interface that answers from a scenario file, for tests and demos without a GPU.

It is C source, compiled at the first use and kept in the cache folder; README.md here describes scenarios.
The compiler is the machine's, or the one in the package ziglang, which brings its own headers and linker.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import MissingError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["DEMO_SCENARIO", "SCENARIO_VARIABLE", "build_fake_nvml", "fake_nvml_environment", "write_scenario"]

DEMO_SCENARIO = Path(__file__).parent / "demo.nvml"
"""Two Tesla P4 under changing load."""
SCENARIO_VARIABLE = "PASCALINE_FAKE_NVML"
"""The variable that names the scenario file to the library."""
LIBRARY_NAME = "libnvidia-ml.so.1"
_SOURCE = Path(__file__).parent / "fake_nvml.c"
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-shared", "-fPIC", "-pthread", f"-Wl,-soname,{LIBRARY_NAME}")


def build_fake_nvml(folder: Path | None = None, *, without: Iterable[str] = ()) -> Path:
    """Compile the library unless it exists already, and return the folder that holds it as libnvidia-ml.so.1.

    `folder` None means the cache folder. `without` names NVML symbols that the library lacks, as an old driver does.
    """
    omitted = sorted(without)
    checksum = hashlib.sha256(_SOURCE.read_bytes() + repr((_FLAGS, omitted)).encode()).hexdigest()[:16]
    target = (folder or _cache_folder()) / f"fake-nvml-{checksum}"
    if not (target / LIBRARY_NAME).exists():
        _compile(target, omitted)
    return target


def fake_nvml_environment(
    scenario: Path, library_folder: Path | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return `base` (None: this process's environment) changed so that a process loads the fake instead of NVML."""
    environment = dict(os.environ if base is None else base)
    paths = [str(library_folder or build_fake_nvml()), environment.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
    environment[SCENARIO_VARIABLE] = str(scenario)
    return environment


def write_scenario(path: Path, text: str) -> None:
    """Replace a scenario file in one step, so that the library never reads half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pascaline"


def _compile(target: Path, omitted: Iterable[str]) -> None:
    # A symbol is left out by giving its function another, local name.
    renames = [f"-D{name}=omitted_{name}" for name in omitted]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            library = Path(scratch) / LIBRARY_NAME
            compiler = _compiler()
            command = [*compiler, *_FLAGS, *renames, "-o", str(library), str(_SOURCE)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**_zig_caches(scratch), **os.environ}
            )
            if done.returncode:
                raise MissingError(f"failed to compile {_SOURCE.name} with {' '.join(compiler)}: {done.stderr.strip()}")
            library.replace(target / LIBRARY_NAME)
    except OSError as error:
        raise StorageError(
            f"failed to write the fake NVML library to {target}: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def _compiler() -> list[str]:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return [path]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    raise MissingError(
        "no C compiler found as $CC, cc, gcc or clang, nor the package ziglang, and the fake NVML library needs one; "
        "install one (Debian: apt install gcc libc6-dev; anywhere: pip install ziglang)"
    )


def _zig_caches(scratch: str) -> dict[str, str]:
    """Zig caches its build of the C library, by default in the home folder, which may not be writable."""
    return {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
