"""Copies host rows to the device in bounded chunks and repacks them there.

A chunk goes through one of two pinned buffers: while the device copies and repacks one, the host fills the other. The
device holds only the matrices and two chunks; the host holds only two chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize as decode_blocks

from sglang_pascal.checkpoint.dequantize import as_tensor
from sglang_pascal.errors import DeviceMemoryError
from sglang_pascal.kernels.driver import KernelError
from sglang_pascal.kernels.formats import GROUP_ROWS
from sglang_pascal.quantization.convert import to_lossless

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sglang_pascal.quantization.matrix import Matrix
    from sglang_pascal.quantization.storage import Storage
    from sglang_pascal.quantization.weight_table import MatrixInfo

CHUNK_BYTES: Final = 64 * 1024 * 1024
"""Size of one chunk. A quarter of it already hides the launches; more only costs memory."""
_N_BUFFERS: Final = 2


class Stager:
    """Loads the matrices of one device."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._is_cuda = device.type == "cuda"
        self._pinned: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._next = 0

    def load(self, matrix: Matrix, info: MatrixInfo, rows: NDArray[np.uint8]) -> None:
        """Fill a matrix from the file's rows `[rows, bytes per row]`."""
        step = self._rows_per_chunk(rows.shape[1], info)
        try:
            for first in range(0, rows.shape[0], step):
                matrix.load_rows(first, self._on_device(_converted(rows[first : first + step], info.storage)))
        except torch.cuda.OutOfMemoryError as exc:
            raise out_of_memory(f"repacking {info}", self._device) from exc
        except KernelError as exc:
            raise KernelError(f"repacking {info}: {exc}") from exc

    def _rows_per_chunk(self, row_bytes: int, info: MatrixInfo) -> int:
        """Return a multiple of 32 rows whose size is at most a chunk, in the file and as sent from the host."""
        most = max(row_bytes, info.storage.n_bytes(GROUP_ROWS, info.columns) // GROUP_ROWS)
        return max(1, self._chunk_bytes // (most * GROUP_ROWS)) * GROUP_ROWS

    def _on_device(self, chunk: NDArray[np.uint8] | NDArray[np.float16]) -> torch.Tensor:
        if not self._is_cuda:
            return as_tensor(chunk)
        if not self._pinned:
            self._pinned = [torch.empty(0, dtype=torch.uint8, pin_memory=True)] * _N_BUFFERS
            self._events = [torch.cuda.Event() for _ in range(_N_BUFFERS)]  # type: ignore[no-untyped-call]
        index, self._next = self._next, (self._next + 1) % _N_BUFFERS
        self._events[index].synchronize()
        if self._pinned[index].numel() < chunk.nbytes:
            self._pinned[index] = torch.empty(chunk.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._pinned[index][: chunk.nbytes]
        flat = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        np.copyto(staged.numpy(), flat)
        moved = staged.to(self._device, non_blocking=True)
        self._events[index].record()  # type: ignore[no-untyped-call]
        return moved.view(torch.float16 if chunk.dtype == np.float16 else torch.uint8).view(chunk.shape)


def _converted(rows: NDArray[np.uint8], storage: Storage) -> NDArray[np.uint8] | NDArray[np.float16]:
    if storage.how == "native" and not storage.is_dense:
        return rows
    if storage.how == "lossless":
        return to_lossless(rows, storage.tensor_type)
    if storage.tensor_type == "F16":
        return rows.view(np.float16)
    with np.errstate(over="ignore"):  # a weight beyond float16's range becomes infinite, which shows later
        return np.asarray(decode_blocks(rows, GGMLQuantizationType[storage.tensor_type])).astype(np.float16)


def out_of_memory(what: str, device: torch.device) -> DeviceMemoryError:
    """Return the error for a failed allocation.

    what: the action in progress, such as `repacking …`.
    """
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemoryError(
        f"{device} ran out of memory while {what}: {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free; "
        "stop other programs that use the card, or choose a smaller quantisation"
    )
