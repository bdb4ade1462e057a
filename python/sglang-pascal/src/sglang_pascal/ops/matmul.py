"""Products with weights: `y[n, row] = sum over k of x[n, k] * w[row, k]`.

The bits of `y[n]` depend on `x[n]`, the weight and the card only: not on how many rows of x are multiplied with it, nor
on which of the two kernels (up to 16 rows, or more) runs. float16 weights are the exception (`matmul_half`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from sglang_pascal.kernels.driver import multiprocessors
from sglang_pascal.kernels.formats import GROUP_ROWS
from sglang_pascal.ops._call import FLOATS, address, is_half, launch, require
from sglang_pascal.ops.activations import Activations
from sglang_pascal.ops.weights import PackedWeight, dequantize
from sglang_pascal.reference import half_matmul_ref, quantized_matmul_ref

DECODE_COLUMNS: Final = 16
"""Most rows of x that the decode kernel takes; a tile kernel multiplies more."""
_DECODE_WIDTHS: Final = (1, 2, 4, 8, 16)
_DECODE_THREADS: Final = 128
_HALF_ROWS: Final = 16
"""Rows of a float16 weight in one CTA: four a warp."""
_HALVES_PER_LOAD: Final = 8
_SLICES: Final = 4
"""Warps of a decode CTA: each sums every fourth tile."""
_CTAS_PER_MULTIPROCESSOR: Final = 8
"""Decode CTAs that a multiprocessor should have to choose from: what keeps a P4's memory busy."""
_TILE_ROWS: Final = 128
_TILE_COLUMNS: Final = 64
_TILE_THREADS: Final = 128
_TILE_CTAS_PER_MULTIPROCESSOR: Final = 2
"""What 200 registers a thread leave room for."""
_SUM_ROWS: Final = 512
"""Rows of a wide product that are summed in float32 at once: at most 60 MB for the widest layer of an 8B model."""


class _Product(NamedTuple):
    """What is multiplied, and into what, as `matmul` takes it."""

    x: Activations
    weight: PackedWeight
    wide: bool
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out: torch.Tensor

    @property
    def n(self) -> int:
        """Rows of x: two for each of `out` where they are wide."""
        return self.x.q.shape[0]


def matmul(
    x: Activations,
    weight: PackedWeight,
    *,
    wide: bool = False,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """`[n, rows]` in `dtype` (float16 or float32).

    wide: x has 2n rows, as `quantize(..., wide=True)` makes them; the products of both halves are added in float32.
    bias: float32 `[rows]`. residual: like the result, added last. out: where to write; its rows may be apart (a range
    of columns of a wider matrix, when several weights make one result).
    """
    n_products = x.q.shape[0]
    n = n_products // (1 + wide)
    require("x.q", x.q, (torch.int8,), (2 * n if wide else None, weight.n_tiles * 256), weight.data)
    require("x.scales", x.scales, (torch.float32,), (n_products, weight.n_tiles * 8, 2), weight.data)
    out = torch.empty(n, weight.rows, dtype=dtype, device=x.q.device) if out is None else out
    require("out", out, FLOATS, (n, weight.rows), weight.data, strided_rows=True)
    if bias is not None:
        require("bias", bias, (torch.float32,), (weight.rows,), weight.data)
    if residual is not None:
        require("residual", residual, (out.dtype,), (n, weight.rows), weight.data, strided_rows=True)
    product = _Product(x, weight, wide, bias, residual, out)
    if not x.q.is_cuda:
        _multiply_on_cpu(product)
    elif 0 < n_products <= DECODE_COLUMNS:
        _decode(product)
    elif n_products and wide:
        _wide_tile(product)
    elif n_products:
        _tile(product)
    return out


def _multiply_on_cpu(product: _Product) -> None:
    x, out = product.x, product.out
    y = quantized_matmul_ref(x.q, x.scales, dequantize(product.weight, torch.float32))
    if product.wide:
        y = y[: len(out)].float() + y[len(out) :].float()
    for addend in (product.bias, product.residual):
        if addend is not None:
            y = y + addend
    out.copy_(y)


def splits_of(weight: PackedWeight) -> int:
    """Into how many parts K is cut, so that a matrix of few rows still fills the card. From its shape and the card."""
    ctas = -(-weight.rows // (2 * GROUP_ROWS))
    wanted = -(-_CTAS_PER_MULTIPROCESSOR * multiprocessors(weight.data.device.index) // ctas)
    return max(1, min(wanted, weight.n_tiles // _SLICES))


def _partials(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


_LAYOUT: Final = "PPPPPPPPqqiiiiiii0P"


def _launch(
    product: _Product, kind: str, suffix: str, threads: int, grid: tuple[int, int, int], partials: torch.Tensor
) -> None:
    """Start `kind` (decode_matmul, tile_matmul) for the weight's type, with the struct that both kernels take."""
    x, weight, residual, out = product.x, product.weight, product.residual, product.out
    launch(
        f"{kind}.{weight.tensor_type}",
        f"{kind}_{weight.tensor_type}{suffix}",
        threads,
        _LAYOUT,
        grid,
        [
            *(weight.data.data_ptr(), x.q.data_ptr(), x.scales.data_ptr(), out.data_ptr()),
            *(address(product.bias), address(residual), partials.data_ptr(), weight.tickets.data_ptr()),
            *(out.stride(0), 0 if residual is None else residual.stride(0)),
            *(weight.rows, weight.n_tiles, weight.n_steps, product.n, is_half(out)),
            *(splits_of(weight), 1 + product.wide),
        ],
        out,
        f"{weight.tensor_type} [{weight.rows}, {weight.columns}], {product.n} rows of x",
    )


def _decode(product: _Product) -> None:
    weight, groups = product.weight, -(-product.weight.rows // GROUP_ROWS)
    width = next(width for width in _DECODE_WIDTHS if width >= product.n)
    splits = splits_of(weight)
    grid = (-(-groups // weight.format.rows_per_lane(width)), splits, 1)
    partials = _partials(splits * product.n * groups * GROUP_ROWS if splits > 1 else 0, product.out)
    _launch(product, "decode_matmul", f"_n{width}", _DECODE_THREADS, grid, partials)


def _wide_tile(product: _Product) -> None:
    """One half after the other and some rows at a time, so that the sum in float32 stays small."""
    (q, scales), weight, residual, out = product.x, product.weight, product.residual, product.out
    n = len(out)
    for first in range(0, n, _SUM_ROWS):
        end = min(first + _SUM_ROWS, n)
        high, low = (
            Activations(q[start + first : start + end], scales[start + first : start + end]) for start in (0, n)
        )
        total = matmul(low, weight, dtype=torch.float32)
        matmul(high, weight, residual=total, out=total)
        for addend in (product.bias, None if residual is None else residual[first:end]):
            if addend is not None:
                total += addend
        out[first:end] = total


def _tile(product: _Product) -> None:
    weight, out = product.weight, product.out
    n_outputs = -(-product.n // _TILE_COLUMNS) * -(-weight.rows // _TILE_ROWS)
    ctas = min(n_outputs, _TILE_CTAS_PER_MULTIPROCESSOR * multiprocessors(out.device.index))
    sums = 2 if splits_of(weight) > 1 else 1
    partials = _partials(ctas * sums * _TILE_ROWS * _TILE_COLUMNS, out)
    _launch(product, "tile_matmul", "", _TILE_THREADS, (ctas, 1, 1), partials)


def matmul_half(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`[n, rows]` = x `[n, columns]` x weight `[rows, columns]`, both float16, summed in float32; result float16.

    Up to 16 rows of x our kernel reads the weight once, whatever n is; more go to torch (cuBLAS), whose bits depend on
    n. bias: float32 `[rows]`. columns: a multiple of 8.
    """
    n, columns = x.shape
    require("x", x, (torch.float16,), (None, None), x)
    require("weight", weight, (torch.float16,), (None, columns), x)
    out = x.new_empty(n, weight.shape[0]) if out is None else out
    require("out", out, FLOATS, (n, weight.shape[0]), x, strided_rows=True)
    if bias is not None:
        require("bias", bias, (torch.float32,), (weight.shape[0],), x)
    if not x.is_cuda or n > DECODE_COLUMNS or columns % _HALVES_PER_LOAD:
        y = x @ weight.T if x.is_cuda else half_matmul_ref(x, weight)
        return out.copy_(y if bias is None else y + bias)
    if n:
        width = next(width for width in _DECODE_WIDTHS if width >= n)
        launch(
            "half_matmul",
            f"half_matmul_n{width}",
            _DECODE_THREADS,
            "PPPPqiiii0P",
            (-(-weight.shape[0] // _HALF_ROWS), 1, 1),
            [
                *(weight.data_ptr(), x.data_ptr(), out.data_ptr(), address(bias), out.stride(0)),
                *(weight.shape[0], columns, n, is_half(out)),
            ],
            x,
            f"float16 {list(weight.shape)}, {n} rows of x",
        )
    return out
