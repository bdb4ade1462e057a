"""Keeps the disk busy while a model's weights are loaded.

Weights are read through a mapping, one after the other. By default the kernel reads 128 KiB ahead, so a fast disk
would wait for the loader and the loader for the disk. What is asked for here comes in the background, and
costs nothing if it is in memory already.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_pascal.checkpoint.gguf_file import GgufFile, TensorInfo

AHEAD_BYTES: Final = 256 * 2**20
"""How far ahead of the loader: more than it takes while a request of the deepest queue is served."""
STEP_BYTES: Final = 128 * 2**10
"""Bytes of one request: the kernel cuts a longer one to the larger of its readahead (128 KiB by default) and the disk's
largest request (`force_page_cache_ra` of Linux)."""


class ReadAhead:
    """Asks the kernel for the tensors behind those that are loaded."""

    def __init__(self, file: GgufFile, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._ahead = ahead_bytes
        self._loaded = 0
        self._asked = 0
        """Bytes of tensors, in the file's order."""
        self._steps = _steps(file)
        self.add(0)

    def add(self, n_bytes: int) -> None:
        """Count n_bytes of tensors more as loaded, and ask for as many more."""
        self._loaded += n_bytes
        while self._asked < self._loaded + self._ahead and (step := next(self._steps, None)):
            data, start, length = step
            data.madvise(mmap.MADV_WILLNEED, start, length)
            self._asked += length


def _steps(file: GgufFile) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Yield (mapping, first byte, bytes) of all tensors' pages in the file's order."""
    for info in file.tensors.values():
        data = file.parts[info.part].data
        end = info.data_offset + info.n_bytes
        for start in range(_page_of(info), end, STEP_BYTES):
            yield data, start, min(STEP_BYTES, end - start)


def _page_of(info: TensorInfo) -> int:
    """Return the first byte of the page in which a tensor begins."""
    return info.data_offset // mmap.PAGESIZE * mmap.PAGESIZE
