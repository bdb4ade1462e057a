"""Compares how fast the loader reads a GGUF file from a cold disk with a plain read of the same file.

    python benchmarks/cold_read.py MODEL.gguf [--rounds 3] [--json FILE]

In turn, each time after the file was dropped from the page cache: a plain read of the whole file in pieces of 16 MiB,
and the loader of sglang-pascal, which goes through a mapping, asks ahead, and copies every tensor to memory in place of
a device. No GPU is needed. Prints bytes per second of each round, both medians and their ratio. Exit code 1 if the
loader's median is below 90 % of the plain read's; 2 if the file system keeps the file's pages (tmpfs does).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.read_ahead import ReadAhead
from sglang_pascal.checkpoint.weights import raw_tensors
from start_time import CHUNK, drop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

AIM = 0.9
MOST_KEPT = 0.1
"""Share of the pages that may be left after they were dropped."""


def plain(path: Path) -> int:
    """Read the whole file; return its bytes."""
    done, buffer = 0, bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            done += n
    return done


def loaded(path: Path) -> int:
    """Read every tensor as the loader does, and copy it; return the bytes."""
    file = GgufFile(path)
    ahead, done = ReadAhead(file), 0
    target = np.empty(max(info.n_bytes for info in file.tensors.values()), dtype=np.uint8)
    for raw in raw_tensors(file):
        rows = raw.rows.reshape(-1)
        target[: len(rows)] = rows
        done += len(rows)
        ahead.add(len(rows))
    return done


def kept_share(path: Path) -> float:
    """Return the share of the file's first GiB that is in the page cache, by mincore(2); 0 if that fails."""
    length = min(path.stat().st_size, 2**30)
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY) as data:
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), pages):
            return 0.0
    return sum(page & 1 for page in pages) / len(pages)


def timed(read: Callable[[Path], int], path: Path) -> float:
    """Drop the file, read it, return bytes per second."""
    drop(path)
    begin = time.monotonic()
    return read(path) / (time.monotonic() - begin)


def main(arguments: Sequence[str]) -> int:
    """Measure both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args(arguments)
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    drop(args.model)
    if (kept := kept_share(args.model)) > MOST_KEPT:
        sys.stderr.write(f"cold_read: error: {kept:.0%} of {args.model} stay in memory; put it on a disk\n")
        return 2
    speeds: dict[str, list[float]] = {"plain": [], "loader": []}
    for _ in range(args.rounds):
        speeds["plain"].append(timed(plain, args.model))
        speeds["loader"].append(timed(loaded, args.model))
        print(f"plain {speeds['plain'][-1] / 1e9:.2f} GB/s, loader {speeds['loader'][-1] / 1e9:.2f} GB/s", flush=True)
    medians = {name: statistics.median(each) for name, each in speeds.items()}
    ratio = medians["loader"] / medians["plain"]
    print(f"medians: {medians['plain'] / 1e9:.2f} and {medians['loader'] / 1e9:.2f} GB/s, ratio {ratio:.2f}")
    if args.json:
        content = {"file_bytes": args.model.stat().st_size, "bytes_per_second": speeds, "ratio": ratio}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if ratio >= AIM else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
