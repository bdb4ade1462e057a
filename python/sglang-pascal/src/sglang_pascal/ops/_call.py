"""Shared by all operations: the checks of arguments, so that kernels can trust them, and the launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.driver import kernel

if TYPE_CHECKING:
    from sglang_pascal.kernels.arguments import Block

FLOATS: Final = (torch.float16, torch.float32)
INDICES: Final = (torch.int32, torch.int64)


class OperationError(PluginError):
    """A tensor that an operation does not accept: wrong type, shape, device or memory layout."""


def launch(
    module: str,
    function: str,
    threads: int,
    grid: tuple[int, int, int],
    arguments: Block,
    like: torch.Tensor,
    what: str = "",
) -> None:
    """Start a kernel on the current stream of the device of `like`. what: shapes, for the error message."""
    kernel(module, function, threads, like.device.index).launch(grid, arguments, what)


def address(tensor: torch.Tensor | None) -> int:
    """Return the device address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def is_half(tensor: torch.Tensor) -> int:
    """Return 1 for float16, 0 for float32."""
    return int(tensor.dtype == torch.float16)


def is_long(tensor: torch.Tensor | None) -> int:
    """Return 1 for int64, 0 for int32 and None."""
    return int(tensor is not None and tensor.dtype == torch.int64)


def require(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    like: torch.Tensor,
    *,
    strided_rows: bool = False,
) -> None:
    """Refuse a tensor of another type, shape (None = any size), device or memory layout.

    strided_rows: the rows of a matrix may be apart, as in a slice of columns.
    """
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise OperationError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, must be {allowed}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise OperationError(f"{name} has shape {list(tensor.shape)}, must be [{wanted}]")
    if tensor.device != like.device:
        raise OperationError(f"{name} is on {tensor.device}, must be on {like.device}")
    dense = tensor.stride(-1) == 1 if strided_rows and tensor.numel() else tensor.is_contiguous()
    if not dense:
        raise OperationError(f"{name} has strides {list(tensor.stride())}, must be contiguous; call contiguous() on it")
