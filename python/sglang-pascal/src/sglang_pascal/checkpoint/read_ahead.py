"""Keeps the disk busy while a model's weights are loaded.

Weights are read through a mapping, one after the other. By default the kernel reads 128 KiB ahead, so a fast disk
would wait for the loader and the loader for the disk. Pages requested here are read in the background; a request for
pages that are already in memory costs nothing.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_pascal.checkpoint.gguf_file import GgufFile, TensorInfo

AHEAD_BYTES: Final = 256 * 2**20
"""Distance ahead of the loader: more than the loader consumes while the deepest disk queue serves a request."""
STEP_BYTES: Final = 128 * 2**10
"""Bytes of one request: the kernel cuts a longer one to the larger of its readahead (128 KiB by default) and the disk's
largest request (`force_page_cache_ra` of Linux)."""


class ReadAhead:
    """Requests the tensors that follow those already loaded."""

    def __init__(self, file: GgufFile, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._ahead = ahead_bytes
        self._loaded = 0
        self._asked = 0
        """Bytes of tensors, in the file's order."""
        self._steps = _steps(file)
        self.add(0)

    def add(self, n_bytes: int) -> None:
        """Count n_bytes of tensors as loaded, and request the same number of bytes ahead."""
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
