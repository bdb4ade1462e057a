"""One weight matrix in memory: loads rows, multiplies, looks up rows.

`ops` does the work. On the CPU it gets only a few groups of rows at a time, so that `CPU_CHUNK_WEIGHTS` bounds the
dequantised weights, whatever the size of the matrix.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

from sglang_pascal.kernels.formats import GROUP_ROWS
from sglang_pascal.ops.activations import Activations, quantize
from sglang_pascal.ops.matmul import matmul, matmul_half
from sglang_pascal.ops.weights import PackedWeight, dequantize, pack_into

if TYPE_CHECKING:
    from collections.abc import Sequence

CPU_CHUNK_WEIGHTS: Final = 4 * 1024 * 1024
"""Weights that are dequantised together on the CPU: 48 MB of float32 and float64."""


class Input:
    """The input of one or several matrices; quantised once, when the first of them needs it."""

    def __init__(self, x: torch.Tensor | None, quantized: Activations | None = None, *, is_16_bit: bool) -> None:
        """x: `[n, columns]`. quantized: the same rows, if they are already quantised. One of the two is enough if all
        matrices are packed. is_16_bit: whether x is quantised to 16 bits, else to 8.
        """
        self._x = x
        self.is_16_bit = is_16_bit
        if quantized is not None:
            self.quantized = quantized

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.x) if self._x is not None else len(self.quantized.q) // (1 + self.is_16_bit)

    @property
    def x(self) -> torch.Tensor:
        """The rows as floats."""
        assert self._x is not None, "a float matrix needs activations that are not quantised"
        return self._x

    @functools.cached_property
    def quantized(self) -> Activations:
        """The rows as int8. The kernels read float16 and float32; other types (bfloat16 on the CPU) are widened."""
        x = self.x if self.x.dtype == torch.float16 else self.x.float()
        return quantize(x.contiguous(), is_16_bit=self.is_16_bit)


@dataclass(frozen=True)
class PackedMatrix:
    """A quantised matrix in the layout of the kernels."""

    weight: PackedWeight

    @property
    def rows(self) -> int:
        """Rows of the tensor, without padding."""
        return self.weight.rows

    @property
    def data(self) -> torch.Tensor:
        """uint8 `[bytes]`."""
        return self.weight.data

    def load_rows(self, first: int, raw: torch.Tensor) -> None:
        """Repack rows of the file into place.

        first: a multiple of 32. raw: uint8 `[n, row bytes]` on the matrix's device; n is a multiple of 32, or reaches
        the last row.
        """
        pack_into(self.weight.row_range(first, raw.shape[0]), raw)

    def multiply(self, x: Input, out: torch.Tensor) -> None:
        """Compute out `[n, rows]` = x `[n, columns]` x this. Rows of out may be apart."""
        if out.is_cuda:
            matmul(x.quantized, self.weight, is_16_bit=x.is_16_bit, out=out)
            return
        step = max(1, CPU_CHUNK_WEIGHTS // (GROUP_ROWS * self.weight.columns)) * GROUP_ROWS
        for first in range(0, self.rows, step):
            part = self.weight.row_range(first, min(step, self.rows - first))
            out[:, first : first + part.rows] = matmul(x.quantized, part, is_16_bit=x.is_16_bit, dtype=torch.float32)

    def lookup(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows `[n]` as `[n, columns]`, dequantised."""
        if ids.is_cuda:
            return dequantize(self.weight, dtype, ids)
        groups = self.data.view(-1, self.data.numel() // len(self.weight.tickets)).index_select(0, ids // GROUP_ROWS)
        n_rows = groups.shape[0] * GROUP_ROWS
        kept = PackedWeight(
            groups.flatten(), self.weight.tensor_type, n_rows, self.weight.columns, self.weight.tickets[:0]
        )
        return dequantize(kept, torch.float32, torch.arange(0, n_rows, GROUP_ROWS) + ids % GROUP_ROWS).to(dtype)


@dataclass(frozen=True)
class DenseMatrix:
    """A float16 matrix, row after row."""

    values: torch.Tensor
    """float16 `[rows, columns]`."""

    @property
    def rows(self) -> int:
        """Rows of the tensor."""
        return self.values.shape[0]

    @property
    def data(self) -> torch.Tensor:
        """uint8 `[bytes]`."""
        return self.values.view(-1).view(torch.uint8)

    def load_rows(self, first: int, values: torch.Tensor) -> None:
        """Put rows `[n, columns]` into place."""
        self.values[first : first + values.shape[0]].copy_(values)

    def multiply(self, x: Input, out: torch.Tensor) -> None:
        """Compute out `[n, rows]` = x `[n, columns]` x this: float16 by our kernel, other types in x's wider type."""
        if x.x.dtype == torch.float16:
            matmul_half(x.x.contiguous(), self.values, out=out)
        else:
            out.copy_(F.linear(x.x, self.values.to(x.x.dtype)))

    def lookup(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows `[n]` as `[n, columns]`."""
        return self.values.index_select(0, ids).to(dtype)


Matrix = PackedMatrix | DenseMatrix


def join_adjacent(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return as few matrices as possible with the same rows in order: one product for q, k and v of one type."""
    joined: list[Matrix] = []
    for matrix in matrices:
        together = _join(joined[-1], matrix) if joined else None
        joined[-1:] = [*joined[-1:], matrix] if together is None else [together]
    return joined


def _join(first: Matrix, second: Matrix) -> Matrix | None:
    """Return one matrix of both, if the second lies right behind the first; otherwise None."""
    if first.data.data_ptr() + first.data.numel() != second.data.data_ptr():
        return None
    data = first.data.as_strided((first.data.numel() + second.data.numel(),), (1,))
    rows = first.rows + second.rows
    match first, second:
        case DenseMatrix(), DenseMatrix() if first.values.shape[1] == second.values.shape[1]:
            return DenseMatrix(data.view(torch.float16).view(rows, -1))
        case PackedMatrix(one), PackedMatrix(other) if (one.tensor_type, one.columns) == (
            other.tensor_type,
            other.columns,
        ) and one.rows % GROUP_ROWS == 0:
            tickets = torch.cat([one.tickets, other.tickets])
            return PackedMatrix(PackedWeight(data, one.tensor_type, rows, one.columns, tickets))
    return None
