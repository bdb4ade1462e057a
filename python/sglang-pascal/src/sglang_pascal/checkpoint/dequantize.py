"""Raw rows -> torch tensor. This is the only place that decides to dequantise at load.

gguf-py's vectorised numpy code decodes rows in chunks, several at a time, straight into the result. The float32 in
between never exceeds `CHUNK_BYTES` per thread, whatever the size of the tensor.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from gguf.quants import dequantize as decode_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from numpy.typing import NDArray

    from sglang_pascal.checkpoint.weights import RawTensor

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Bytes of decoded float32 in one chunk: fits the second-level caches, and makes numpy's overhead small."""
MAX_THREADS: Final = 8
"""More threads gain nothing: memory bandwidth bounds the copies into the result."""


def dequantized(
    tensors: Iterable[RawTensor],
    dtype: torch.dtype,
    *,
    keep: Container[str] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor on the CPU) for each raw tensor, as SGLang's `load_weights` takes them.

    keep: matrices, without `.weight`, that stay as they are in the file: uint8 `[rows, bytes per row]`.
    on_bytes: called with the bytes of each tensor in the file when the caller is done with it.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="dequantize") as pool:
        for raw in tensors:
            is_kept = raw.hf_name.removesuffix(".weight") in keep
            yield raw.hf_name, as_tensor(raw.rows) if is_kept else dequantize_tensor(raw, dtype, pool)
            if on_bytes is not None:
                on_bytes(raw.rows.nbytes)


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """Wrap without a copy. torch warns that the file's memory is read-only, but nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def dequantize_tensor(raw: RawTensor, dtype: torch.dtype, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Return one tensor in `dtype`."""
    result = torch.empty(raw.rows.shape[0], raw.shape[-1], dtype=dtype)
    step = max(1, CHUNK_BYTES // (4 * raw.shape[-1]))

    def decode(start: int) -> None:
        rows: NDArray[np.uint8] = raw.rows[start : start + step]
        # Float rows come back as a read-only view of the file, about which torch warns: copy them first.
        decoded = np.require(decode_blocks(rows, raw.tensor_type), requirements="W")
        result[start : start + step] = torch.from_numpy(decoded)

    for _ in pool.map(decode, range(0, raw.rows.shape[0], step)):
        pass
    return result.view(raw.shape)
