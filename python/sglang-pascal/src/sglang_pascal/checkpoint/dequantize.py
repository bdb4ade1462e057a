"""Raw rows -> torch tensor. The one place that decides to dequantise at load.

Rows are decoded by gguf-py's vectorised numpy code in chunks, several at a time, straight into the result: the float32
in between never exceeds `CHUNK_BYTES` per thread, whatever the size of the tensor.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from gguf.quants import dequantize as decode_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from sglang_pascal.checkpoint.weights import RawTensor

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Bytes of decoded float32 in one chunk: fits the second-level caches, and numpy's overhead is small against it."""
MAX_THREADS: Final = 8
"""More gain nothing: the copies into the result are bound by memory bandwidth."""


def dequantized(tensors: Iterable[RawTensor], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor on the CPU) for each raw tensor, as SGLang's `load_weights` takes them."""
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="dequantize") as pool:
        for raw in tensors:
            yield raw.hf_name, dequantize_tensor(raw, dtype, pool)


def dequantize_tensor(raw: RawTensor, dtype: torch.dtype, pool: ThreadPoolExecutor) -> torch.Tensor:
    """One tensor in `dtype`."""
    result = torch.empty(raw.rows.shape[0], raw.shape[-1], dtype=dtype)
    step = max(1, CHUNK_BYTES // (4 * raw.shape[-1]))

    def decode(start: int) -> None:
        rows: NDArray[np.uint8] = raw.rows[start : start + step]
        # Float rows come back as a read-only view of the file, which torch warns about: those are copied first.
        decoded = np.require(decode_blocks(rows, raw.tensor_type), requirements="W")
        result[start : start + step] = torch.from_numpy(decoded)

    for _ in pool.map(decode, range(0, raw.rows.shape[0], step)):
        pass
    return result.view(raw.shape)
