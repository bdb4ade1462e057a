"""Makes a GGUF file with random weights in the shape of a known model, as fast as the disk takes it.

    python benchmarks/random_model.py llama-3.1-8b|qwen2.5-7b|... FILE.gguf [--mixture Q4_K_M]

For measurements of speed and memory only: the matrices repeat the same random blocks, so the text is nonsense. Types,
vocabulary and RoPE factors are those of the real model (tests/support/models.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

POOL_ROWS = 4096
"""Rows of random weights per type and width; a larger matrix repeats them."""


def pooled(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Return `models.random_tensor` with the same rows for all matrices of a type and width."""
    pools: dict[tuple[str, int], np.ndarray] = {}

    def tensor(random: np.random.Generator, size: tuple[int, ...], kind: str) -> np.ndarray:
        if len(size) == 1:
            return make(random, size, kind)
        pool = pools.get((kind, size[1]))
        if pool is None:
            pool = pools[kind, size[1]] = make(random, (POOL_ROWS, size[1]), kind)
        return np.resize(pool, (size[0], *pool.shape[1:]))

    return tensor


def main(arguments: Sequence[str]) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(models.SHAPES))
    parser.add_argument("file", metavar="FILE.gguf", type=Path)
    parser.add_argument("--mixture", default="Q4_K_M", help="as llama-quantize names it (default: %(default)s)")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    models.random_tensor = pooled(models.random_tensor)
    models.write_gguf(args.file, models.SHAPES[args.shape], args.mixture)
    print(f"{args.file}: {args.file.stat().st_size:,} bytes in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
