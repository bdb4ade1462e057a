"""Quantised weights in device memory: packs them into the kernels' layout, and turns rows back into floats.

A `PackedWeight` holds the bytes of the GGUF tensor in another order, plus padding: rows to a multiple of 32, columns to
a multiple of 64 (only types with blocks of 32 can need that). To load a tensor in pieces, or several tensors into one
matrix (query, key, value; gate, up), allocate the whole matrix and pack into its row ranges:

    weight = allocate_packed("Q4_K", rows=8192, columns=4096, device=device)
    pack_into(weight.row_range(0, 4096), gate_bytes)     # uint8 [4096, row_bytes], on the device
    pack_into(weight.row_range(4096, 4096), up_bytes)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.arguments import Dequantize, Repack
from sglang_pascal.kernels.formats import FORMATS, GROUP_ROWS, Format, steps, tiles
from sglang_pascal.ops._call import FLOATS, INDICES, OperationError, address, is_half, is_long, launch, require
from sglang_pascal.reference import dequantize_ref, repack_ref, unrepack_ref

_THREADS = 256
_TILES_PER_CTA = 8
"""Tiles that one CTA of `dequantize` handles, one per warp."""


class UnsupportedTypeError(PluginError):
    """A tensor type, or a shape of one, for which there are no kernels."""

    exit_code = 3


@dataclass(frozen=True)
class PackedWeight:
    """A matrix `[rows, columns]` of one quantised type, in the layout of the kernels (`kernels/weights.cuh`)."""

    data: torch.Tensor
    """uint8 `[packed_bytes]`."""
    tensor_type: str
    rows: int
    columns: int
    tickets: torch.Tensor
    """int32 `[groups]`, zero between products: counts the parts of a sum. A weight serves one product at a time."""

    @property
    def format(self) -> Format:
        """The layout of its type."""
        return FORMATS[self.tensor_type]

    @property
    def n_tiles(self) -> int:
        """Tiles of 256 columns along a row; the last may have fewer columns."""
        return tiles(self.columns)

    @property
    def n_steps(self) -> int:
        """Steps of 64 columns along a row."""
        return steps(self.columns)

    def row_range(self, first: int, rows: int) -> PackedWeight:
        """Return some rows as a view. `first` is a multiple of 32; so is `rows`, unless the range ends the matrix."""
        if first % GROUP_ROWS or (rows % GROUP_ROWS and first + rows != self.rows) or first + rows > self.rows:
            raise OperationError(
                f"rows {first} to {first + rows} of a {self.tensor_type} matrix of {self.rows} rows: "
                f"a range must begin at a multiple of {GROUP_ROWS}, and end at one or with the matrix"
            )
        per_group = self.format.packed_bytes(GROUP_ROWS, self.columns)
        group, groups = first // GROUP_ROWS, -(-rows // GROUP_ROWS)
        return PackedWeight(
            self.data[group * per_group : (group + groups) * per_group],
            self.tensor_type,
            rows,
            self.columns,
            self.tickets[group : group + groups],
        )


def format_of(tensor_type: str, columns: int) -> Format:
    """Return the layout of a type. Refuses a type without kernels, and a row length that its blocks do not divide."""
    if tensor_type not in FORMATS:
        raise UnsupportedTypeError(f"no kernel for tensor type {tensor_type}; types with kernels: {', '.join(FORMATS)}")
    form = FORMATS[tensor_type]
    if columns % form.block_weights:
        raise UnsupportedTypeError(
            f"a {tensor_type} matrix with {columns} columns: must be a multiple of {form.block_weights}"
        )
    return form


def allocate_packed(tensor_type: str, rows: int, columns: int, device: torch.device) -> PackedWeight:
    """Return uninitialised memory for a matrix. Raises torch.OutOfMemoryError."""
    form = format_of(tensor_type, columns)
    data = torch.empty(form.packed_bytes(rows, columns), dtype=torch.uint8, device=device)
    tickets = torch.zeros(-(-rows // GROUP_ROWS), dtype=torch.int32, device=device)
    return PackedWeight(data, tensor_type, rows, columns, tickets)


def pack(raw: torch.Tensor, tensor_type: str, columns: int) -> PackedWeight:
    """Pack a whole GGUF tensor, uint8 `[rows, row_bytes]`, on its device."""
    weight = allocate_packed(tensor_type, raw.shape[0], columns, raw.device)
    pack_into(weight, raw)
    return weight


def pack_into(weight: PackedWeight, raw: torch.Tensor) -> None:
    """Pack a GGUF tensor's rows, uint8 `[weight.rows, row_bytes]`, into allocated memory."""
    require("raw", raw, (torch.uint8,), (weight.rows, weight.format.row_bytes(weight.columns)), weight.data)
    if raw.is_cuda:
        _move("repack", weight, raw.data_ptr(), weight.data.data_ptr())
    else:
        weight.data.copy_(repack_ref(raw, weight.tensor_type))


def unpack(weight: PackedWeight) -> torch.Tensor:
    """Return the GGUF tensor's bytes: uint8 `[rows, row_bytes]`."""
    if not weight.data.is_cuda:
        return unrepack_ref(weight.data, weight.tensor_type, weight.rows, weight.columns)
    raw = weight.data.new_empty(weight.rows, weight.format.row_bytes(weight.columns))
    _move("unrepack", weight, weight.data.data_ptr(), raw.data_ptr())
    return raw


def _move(function: str, weight: PackedWeight, source: int, target: int) -> None:
    units = weight.data.numel() // 16
    row_bytes = weight.format.row_bytes(weight.columns)
    launch(
        f"repack.{weight.tensor_type}",
        f"{function}_{weight.tensor_type}",
        _THREADS,
        (-(-units // _THREADS), 1, 1),
        Repack(
            in_=source,
            out=target,
            rows=weight.rows,
            row_bytes=row_bytes,
            n_records=weight.format.records(weight.columns),
            n_units=units,
        ),
        weight.data,
        f"{weight.tensor_type} [{weight.rows}, {weight.columns}]",
    )


def dequantize(weight: PackedWeight, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows as float16 or float32: all `[rows, columns]`, or rows `ids` of an embedding `[len(ids), columns]`.

    A row that is out of range becomes NaN: a device error could not stop the host.
    """
    if dtype not in FLOATS:
        raise OperationError(f"dequantize to {str(dtype).removeprefix('torch.')}, must be float16 or float32")
    if ids is not None:
        require("ids", ids, INDICES, (None,), weight.data)
    if not weight.data.is_cuda:
        return _dequantize_on_cpu(weight, ids).to(dtype)
    n = weight.rows if ids is None else ids.shape[0]
    out = torch.empty(n, weight.columns, dtype=dtype, device=weight.data.device)
    if n:
        launch(
            f"repack.{weight.tensor_type}",
            f"dequantize_{weight.tensor_type}",
            _THREADS,
            (n, -(-weight.n_tiles // _TILES_PER_CTA), 1),
            Dequantize(
                weights=weight.data.data_ptr(),
                ids=address(ids),
                out=out.data_ptr(),
                ids_are_64_bit=is_long(ids),
                out_is_half=is_half(out),
                rows=weight.rows,
                n_steps=weight.n_steps,
                columns=weight.columns,
            ),
            weight.data,
            f"{weight.tensor_type} [{weight.rows}, {weight.columns}]",
        )
    return out


def _dequantize_on_cpu(weight: PackedWeight, ids: torch.Tensor | None) -> torch.Tensor:
    raw = unpack(weight)
    if ids is None:
        return dequantize_ref(raw, weight.tensor_type)
    outside = (ids < 0) | (ids >= weight.rows)
    rows = dequantize_ref(raw[torch.where(outside, 0, ids)], weight.tensor_type)
    return rows.masked_fill(outside[:, None], float("nan"))
