"""Compiles every module of this interpreter's environment to bytecode, with progress; `./dev` runs it after an install.

uv would do it too, but says nothing for the minutes that it takes.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
import time
from compileall import compile_file
from concurrent.futures import ProcessPoolExecutor
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path

SECONDS_BETWEEN_LINES = 5.0


def main() -> None:
    """Compile what has no bytecode yet; a module that cannot be compiled (a template, say) is left as it is."""
    folder = Path(sysconfig.get_path("purelib"))
    files = [str(path) for path in folder.rglob("*.py") if not is_compiled(path)]
    if not files:
        return
    print(f"dev: compiling {len(files)} modules to bytecode; every later start is faster for it", file=sys.stderr)
    said = time.monotonic()
    with ProcessPoolExecutor() as pool:
        compiled = pool.map(functools.partial(compile_file, quiet=2), files, chunksize=32)
        for count, _ in enumerate(compiled, 1):
            if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"dev: compiled {count} of {len(files)}", file=sys.stderr)


def is_compiled(path: Path) -> bool:
    """Whether a module has bytecode of this Python and of its present source (PEP 552: magic, flags, time, size)."""
    try:
        with Path(cache_from_source(str(path))).open("rb") as file:
            header = file.read(16)
    except OSError:
        return False
    time_of_source = (int(path.stat().st_mtime) & 0xFFFFFFFF).to_bytes(4, "little")
    return header[:4] == MAGIC_NUMBER and (any(header[4:8]) or header[8:12] == time_of_source)


if __name__ == "__main__":
    main()
