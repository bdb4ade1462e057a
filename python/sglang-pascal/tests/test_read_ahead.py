"""The kernel is asked for every page of the weights once, in order, and never much further than they are loaded."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
from sglang_pascal.checkpoint import read_ahead
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.read_ahead import STEP_BYTES, ReadAhead
from support.models import split_gguf, tiny, write_gguf


class Mapping:
    """Records its requests."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == mmap.MADV_WILLNEED
        assert start % mmap.PAGESIZE == 0
        assert 0 < length <= STEP_BYTES
        self.asked.append((start, length))


def model(*tensors: tuple[int, int, int]) -> SimpleNamespace:
    """tensors: (file, first byte, bytes)."""
    infos = {str(i): SimpleNamespace(part=p, data_offset=o, n_bytes=n) for i, (p, o, n) in enumerate(tensors)}
    parts = [SimpleNamespace(data=Mapping()) for _ in range(1 + max(part for part, _, _ in tensors))]
    return SimpleNamespace(tensors=infos, parts=parts)


def pages(mapping: Mapping) -> set[int]:
    return {
        page for start, n in mapping.asked for page in range(start // mmap.PAGESIZE, -(-(start + n) // mmap.PAGESIZE))
    }


def test_it_stays_a_window_ahead_of_what_is_loaded():
    file = model((0, 100, 10 * STEP_BYTES), (0, 100 + 10 * STEP_BYTES, 5))
    ahead = ReadAhead(file, ahead_bytes=2 * STEP_BYTES)
    mapping = file.parts[0].data
    assert mapping.asked == [(0, STEP_BYTES), (STEP_BYTES, STEP_BYTES)]
    ahead.add(STEP_BYTES)
    assert len(mapping.asked) == 3
    ahead.add(10 * STEP_BYTES)
    assert pages(mapping) == set(range(-(-(105 + 10 * STEP_BYTES) // mmap.PAGESIZE)))
    count = len(mapping.asked)
    ahead.add(10**9)
    assert len(mapping.asked) == count, "nothing is left to ask for"


@pytest.mark.parametrize("n_bytes", [1, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1])
def test_every_part_of_a_split_model_is_asked_for(n_bytes):
    file = model((0, 4096, n_bytes), (1, 8192, n_bytes))
    ReadAhead(file)
    for part, first in zip(file.parts, (1, 2), strict=True):
        assert pages(part.data) == set(range(first, first - (-n_bytes // 4096)))


def test_the_kernel_accepts_what_a_real_file_asks_for(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "Q4_0")
    ahead = ReadAhead(GgufFile(split_gguf(path, 2)[0]), ahead_bytes=1)
    ahead.add(10**9)
    assert next(ahead._steps, None) is None
    assert read_ahead.AHEAD_BYTES % STEP_BYTES == 0
