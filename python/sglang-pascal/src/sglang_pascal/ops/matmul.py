"""Products with weights: `y[n, row] = sum over k of x[n, k] * w[row, k]`.

The bits of `y[n]` depend only on `x[n]`, its number of bits, the weight and the card. They do not depend on how many
rows x has, nor on which of the kernels runs. float16 weights are the exception (`matmul_half`).

A decode kernel multiplies few rows of x. For more rows, `parts` chooses a tile kernel, or several kernels of either
kind: those with the least cost by a P4's memory, issue slots and shared loads.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from sglang_pascal.kernels.arguments import HalfProduct, QuantizedProduct
from sglang_pascal.kernels.driver import has_dp4a, multiprocessors
from sglang_pascal.kernels.formats import GROUP_ROWS
from sglang_pascal.ops._call import FLOATS, address, is_half, launch, require
from sglang_pascal.ops.weights import PackedWeight, dequantize
from sglang_pascal.reference import half_matmul_ref, quantized_matmul_ref

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sglang_pascal.kernels.formats import Format
    from sglang_pascal.ops.activations import Activations

DECODE_WIDTHS: Final = {
    8: {1: 1, 2: 1, 3: 2, 4: 2, 6: 2, 8: 2, 12: 2, 16: 3, 24: 3, 32: 3},
    16: {1: 1, 2: 2, 3: 2, 4: 2, 6: 2, 8: 4, 12: 4, 16: 4, 24: 3},
}
"""Bits of x -> the decode kernels: most rows of x of each kernel -> rows of the weight per lane (N and R of
`decode_matmul.cu`)."""
TILE_WIDTHS: Final = {8: {32: 3, 40: 2, 48: 2, 56: 2, 64: 2, 128: 1}, 16: {32: 3, 40: 2, 48: 2, 56: 2, 64: 2}}
"""Bits of x -> the tile kernels: rows of x in a tile -> CTAs for which a multiprocessor has registers."""
MEMORY_CLOCKS: Final = 128.0
"""Clocks in which a P4's multiprocessor gets 64 weights of 32 rows of Q4_K: 1152 bytes at 192 GB/s / 20, 1.063 GHz."""
LAUNCH_CLOCKS: Final = 3.0
"""Cost of a further kernel: at its start and its end, not all multiprocessors are busy."""
NOT_OVERLAPPED: Final = 0.25
"""Share of the shorter of the two times, memory and instructions, that does not overlap the longer (estimate)."""
ROW_CLOCKS: Final = {8: {12: 6.0, 24: 6.7, 32: 7.2}, 16: {16: 10.6, 24: 12.0}}
"""Bits of x -> widest decode kernel with this rate -> clocks per row of x: issue slots, or shared loads at four clocks.
Kernels that load no weights ahead take more."""
TILE_CLOCKS: Final = {
    8: {32: 211.0, 40: 262.0, 48: 310.0, 56: 361.0, 64: 410.0, 128: 830.0},
    16: {32: 362.0, 40: 447.0, 48: 527.0, 56: 605.0, 64: 684.0},
}
"""Bits of x -> tile -> clocks: issue slots of the inner loop, plus 11 to 16 % for the rest."""
_SM60: Final = 2
"""Most weight rows per lane, and tiles per multiprocessor, without dp4a: separate bytes take more registers."""
_SM60_TILE_BITS: Final = 512
"""Most bits of x in a tile (rows x bits) with which the shared memory of sm_60 holds two tiles per multiprocessor."""
_WIDE: Final = 24
"""Rows of x above which an sm_60 lane has registers for only one row of a type with scales and minima per step."""
_MANY: Final = 20
"""Rows of x above which a lane of a decode kernel has registers for one row of the weight less."""
_HALF_WIDTHS: Final = (1, 2, 4, 8, 16)
_DECODE_THREADS: Final = 128
_HALF_ROWS: Final = 16
"""Rows of a float16 weight in one CTA: four per warp."""
_HALVES_PER_LOAD: Final = 8
_SLICES: Final = 4
"""Warps of a decode CTA: each sums every fourth tile."""
_CTAS_PER_MULTIPROCESSOR: Final = 3
"""Decode CTAs with two rows per lane for which a multiprocessor has registers."""
_AS_FAST: Final = 1.05
"""Of tiles whose estimates differ by less, the one that takes least for a row of x is chosen; the widest, if parts of K
have CTAs of their own."""
_TILE_ROWS: Final = 128
_TILE_THREADS: Final = 128
_TILE_COLUMNS: Final = 64
"""Rows of x that 128 threads of a tile multiply; wider tiles have twice the threads."""


class _Product(NamedTuple):
    """The operands and the output of `matmul`."""

    x: Activations
    weight: PackedWeight
    is_16_bit: bool
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    out: torch.Tensor

    @property
    def n(self) -> int:
        """Rows of the result."""
        return len(self.out)

    @property
    def bits(self) -> int:
        """Bits of each value of x."""
        return 16 if self.is_16_bit else 8


def matmul(
    x: Activations,
    weight: PackedWeight,
    *,
    is_16_bit: bool = False,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    only: Part | None = None,
) -> torch.Tensor:
    """Return `[n, rows]` in `dtype` (float16 or float32).

    is_16_bit: x has 16 bits in 2n rows, as `quantize(..., is_16_bit=True)` makes them.
    bias: float32 `[rows]`. residual: like the result, added last. out: receives the result; it may be a range of
    columns of a wider matrix, if several weights make one result. only: the kernel that multiplies all rows, for a
    test or a benchmark (`every_kernel`).
    """
    n_int8 = x.q.shape[0]
    n = n_int8 // (1 + is_16_bit)
    require("x.q", x.q, (torch.int8,), (2 * n if is_16_bit else None, weight.n_tiles * 256), weight.data)
    require("x.scales", x.scales, (torch.float32,), (n_int8, weight.n_tiles * 8, 2), weight.data)
    out = torch.empty(n, weight.rows, dtype=dtype, device=x.q.device) if out is None else out
    require("out", out, FLOATS, (n, weight.rows), weight.data, strided_rows=True)
    if bias is not None:
        require("bias", bias, (torch.float32,), (weight.rows,), weight.data)
    if residual is not None:
        require("residual", residual, (out.dtype,), (n, weight.rows), weight.data, strided_rows=True)
    product = _Product(x, weight, is_16_bit, bias, residual, out)
    if not x.q.is_cuda:
        _multiply_on_cpu(product)
    elif only is not None:
        (_tile if only.is_tiles else _decode)(product, only)
    else:
        for part in parts(n, product.bits):
            if part.is_tiles:
                _tile(product, _fitting(part, product))
            else:
                _decode(product, part)
    return out


def _fitting(part: Part, product: _Product) -> Part:
    weight, device = product.weight, product.out.device.index
    return part._replace(width=fitting_width(part.n, product.bits, weight.rows, splits_of(weight), device))


class Part(NamedTuple):
    """Rows of x that one kernel multiplies."""

    first: int
    end: int
    width: int
    """Rows of x for which the kernel, or each of its tiles, is made."""
    is_tiles: bool

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.end - self.first


def every_kernel(bits: int) -> Iterator[Part]:
    """Yield each decode kernel with its fewest and its most rows, and each tile kernel with and without a rest."""
    for fewest, width in pairwise((0, *DECODE_WIDTHS[bits])):
        yield from (Part(0, n, width, is_tiles=False) for n in sorted({fewest + 1, width}))
    for width in TILE_WIDTHS[bits]:
        yield from (Part(0, n, width, is_tiles=True) for n in (width, width + 5))


@functools.cache
def parts(n: int, bits: int) -> tuple[Part, ...]:
    """Return the kernels for n rows of x that together cost least (`cost`), the widest tiles first."""
    width = min(TILE_WIDTHS[bits], key=lambda width: TILE_CLOCKS[bits][width] / width)
    whole = max(0, n // width - 1) * width
    first = [Part(0, whole, width, is_tiles=True)] if whole else []
    candidates = [_joined([*first, *_cheapest(bits)[n - whole]])]
    if whole:
        candidates.append((Part(0, n, width, is_tiles=True),))
    return min(candidates, key=lambda found: sum(cost(part, bits) for part in found))


def _joined(chosen: list[Part]) -> tuple[Part, ...]:
    """Give each part its rows, the widest tiles first; whole tiles of one width are one part."""
    found: list[Part] = []
    for part in sorted(chosen, key=lambda part: (part.is_tiles, part.width, part.n), reverse=True):
        last = found[-1] if found else None
        first = last.end if last else 0
        if last and part.is_tiles and last.width == part.width and not last.n % last.width:
            found[-1] = last._replace(end=first + part.n)
        else:
            found.append(part._replace(first=first, end=first + part.n))
    return tuple(found)


@functools.cache
def _cheapest(bits: int) -> list[tuple[Part, ...]]:
    """Return the parts that cost least, each from row 0, for 0, 1, 2 ... rows of x, below two of the widest tiles."""
    best: list[tuple[float, tuple[Part, ...]]] = [(0.0, ())]
    for n in range(1, 2 * max(TILE_WIDTHS[bits])):
        options = [_decode_part(m, bits) for m in range(1, min(n, max(DECODE_WIDTHS[bits])) + 1)]
        options += [Part(0, min(n, width), width, is_tiles=True) for width in TILE_WIDTHS[bits]]
        candidates = ((cost(part, bits) + best[n - part.n][0], (part, *best[n - part.n][1])) for part in options)
        best.append(min(candidates, key=lambda found: found[0]))
    return [parts for _, parts in best]


def _decode_part(n: int, bits: int) -> Part:
    return Part(0, n, next(width for width in DECODE_WIDTHS[bits] if width >= n), is_tiles=False)


def cost(part: Part, bits: int) -> float:
    """Return the clocks of a P4's multiprocessor for 64 weights of 32 rows of Q4_K, by memory and by slots."""
    if part.is_tiles:
        clocks = -(-part.n // part.width) * TILE_CLOCKS[bits][part.width]
    else:
        clocks = part.n * next(rate for width, rate in ROW_CLOCKS[bits].items() if width >= part.width)
    return LAUNCH_CLOCKS + max(MEMORY_CLOCKS, clocks) + NOT_OVERLAPPED * min(MEMORY_CLOCKS, clocks)


@functools.cache
def fitting_width(n: int, bits: int, rows: int, splits: int, device: int | None) -> int:
    """Return the tile that is fastest for n rows of x and `rows` of a weight.

    It is never wider than one that needs as many tiles. What counts are the tiles of the multiprocessor that has most;
    tiles are taken in turn, so behind the first round it has the mean: a round that leaves half of the card empty
    counts half.
    """

    def clocks(width: int) -> float:
        tiles, room = _tiles(n, width, rows), _room(width, bits, device)
        apart = splits if _are_apart(splits, tiles, room) else 1
        each = tiles * apart / (room // _ctas(width, bits, device))
        most = math.ceil(each) if tiles * apart <= room else each
        return most * TILE_CLOCKS[bits][width] / apart

    narrowest = {-(-n // width): width for width in sorted(TILE_WIDTHS[bits], reverse=True)}
    found = {width: clocks(width) for width in narrowest.values()}
    close = [width for width in found if found[width] <= _AS_FAST * min(found.values())]
    if all(_are_apart(splits, _tiles(n, width, rows), _room(width, bits, device)) for width in close):
        return max(close)  # fewer partial sums
    return min(close, key=lambda width: TILE_CLOCKS[bits][width] / width)


def _multiply_on_cpu(product: _Product) -> None:
    y = quantized_matmul_ref(*product.x, dequantize(product.weight, torch.float32), is_16_bit=product.is_16_bit)
    for addend in (product.bias, product.residual):
        if addend is not None:
            y = y + addend
    product.out.copy_(y)


def splits_of(weight: PackedWeight) -> int:
    """Return the number of parts of K, so that a matrix of few rows still fills the card. Shape and card decide it."""
    return _splits(weight.rows, weight.n_tiles, multiprocessors(weight.data.device.index))


@functools.cache
def _splits(rows: int, n_tiles: int, count: int) -> int:
    """Return the number of parts that takes least time.

    The time is the number of rounds in which CTAs fill `count` multiprocessors, times the time of a CTA: the tiles of
    the warp with most tiles, plus about one for its start and its end.
    """
    ctas, room = -(-rows // (2 * GROUP_ROWS)), _CTAS_PER_MULTIPROCESSOR * count

    def clocks(splits: int) -> float:
        tiles = -(-n_tiles // splits)
        return max(1.0, ctas * splits / room) * (1 + -(-tiles // _SLICES))

    return min(range(1, max(1, n_tiles // _SLICES) + 1), key=clocks)


def _partials(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device=like.device)


KINDS: Final = {False: "decode_matmul", True: "tile_matmul"}


def _launch(product: _Product, part: Part, threads: int, grid: tuple[int, int, int], partials: torch.Tensor) -> None:
    """Start the kernel of a part, with the struct that all kernels take."""
    (q, scales), weight, bits, kind = product.x, product.weight, product.bits, KINDS[part.is_tiles]
    out, residual = (None if t is None else t[part.first : part.end] for t in (product.out, product.residual))
    assert out is not None
    launch(
        f"{kind}.{weight.tensor_type}.{bits}",
        f"{kind}_{weight.tensor_type}_{bits}bit_n{part.width}",
        threads,
        grid,
        QuantizedProduct(
            weights=weight.data.data_ptr(),
            x=q[part.first :].data_ptr(),
            x_scales=scales[part.first :].data_ptr(),
            y=out.data_ptr(),
            bias=address(product.bias),
            residual=address(residual),
            partials=partials.data_ptr(),
            tickets=weight.tickets.data_ptr(),
            y_stride=out.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            rows=weight.rows,
            n_tiles=weight.n_tiles,
            n_steps=weight.n_steps,
            n=part.n,
            y_is_half=is_half(out),
            splits=splits_of(weight),
            low=product.n if product.is_16_bit else 0,
        ),
        out,
        f"{weight.tensor_type} [{weight.rows}, {weight.columns}], {part.n} rows of x with {bits} bits",
    )


def _decode(product: _Product, part: Part) -> None:
    weight, groups = product.weight, -(-product.weight.rows // GROUP_ROWS)
    most = most_rows_per_lane(weight.format, part.width, dp4a=has_dp4a(product.out.device.index))
    rows_per_lane = rows_per_lane_of(product.bits, part.width, most)
    splits = splits_of(weight)
    partials = _partials(splits * part.n * groups * GROUP_ROWS if splits > 1 else 0, product.out)
    _launch(product, part, _DECODE_THREADS, (-(-groups // rows_per_lane), splits, 1), partials)


def most_rows_per_lane(form: Format, width: int, *, dp4a: bool) -> int:
    """Return the most rows of a weight for which a lane of a decode kernel has registers on an architecture."""
    if dp4a:
        return form.most_rows_per_lane
    return 1 if width > _WIDE and form.short_tiles and form.has_min else _SM60


def rows_per_lane_of(bits: int, width: int, most: int) -> int:
    """Return the rows of the weight per lane of a decode kernel. most: see `most_rows_per_lane`."""
    return min(DECODE_WIDTHS[bits][width], min(most, max(_SM60, most - 1)) if width > _MANY else most)


def _tile(product: _Product, part: Part) -> None:
    """Start a tile kernel. Tiles that would not fill half of the card are cut along K; the last CTA adds the parts."""
    weight, device, bits = product.weight, product.out.device.index, product.bits
    splits, groups = splits_of(weight), -(-weight.rows // GROUP_ROWS)
    tiles, room = _tiles(part.n, part.width, weight.rows), _room(part.width, bits, device)
    if _are_apart(splits, tiles, room):
        grid = (tiles, splits, 1)
        count = splits * (tiles * _TILE_ROWS * part.width + part.n * groups * GROUP_ROWS)
    else:
        grid = (min(tiles, room), 1, 1)
        count = grid[0] * min(splits, 2) * _TILE_ROWS * part.width
    _launch(product, part, tile_threads(part.width), grid, _partials(count, product.out))


def _tiles(n: int, width: int, rows: int) -> int:
    return -(-n // width) * -(-rows // _TILE_ROWS)


def _ctas(width: int, bits: int, device: int | None) -> int:
    """Return the CTAs that a multiprocessor holds."""
    most = TILE_WIDTHS[bits][width]
    return most if has_dp4a(device) else min(most, _SM60 if width * bits <= _SM60_TILE_BITS else 1)


def _room(width: int, bits: int, device: int | None) -> int:
    """Return the CTAs that a card holds."""
    return _ctas(width, bits, device) * multiprocessors(device)


def _are_apart(splits: int, tiles: int, room: int) -> bool:
    """Whether each split of K has CTAs of its own."""
    return splits > 1 and 2 * tiles <= room


def tile_threads(width: int) -> int:
    """Return the threads of the tile kernel for `width` rows of x."""
    return _TILE_THREADS * (2 if width > _TILE_COLUMNS else 1)


def takes_half(x: torch.Tensor) -> bool:
    """Whether `matmul_half` multiplies x `[n, columns]` by our kernel rather than by torch."""
    return x.dtype == torch.float16 and len(x) <= _HALF_WIDTHS[-1] and not x.shape[1] % _HALVES_PER_LOAD


def matmul_half(
    x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x `[n, columns]` x weight `[rows, columns]`, both float16, summed in float32, as float16 `[n, rows]`.

    Up to 16 rows of x, our kernel reads the weight once for all of them. Torch (cuBLAS) multiplies more rows; its bits
    depend on n. bias: float32 `[rows]`. columns: a multiple of 8.
    """
    n, columns = x.shape
    require("x", x, (torch.float16,), (None, None), x)
    require("weight", weight, (torch.float16,), (None, columns), x)
    out = x.new_empty(n, weight.shape[0]) if out is None else out
    require("out", out, FLOATS, (n, weight.shape[0]), x, strided_rows=True)
    if bias is not None:
        require("bias", bias, (torch.float32,), (weight.shape[0],), x)
    if not x.is_cuda or not takes_half(x):
        y = x @ weight.T if x.is_cuda else half_matmul_ref(x, weight)
        return out.copy_(y if bias is None else y + bias)
    if n:
        width = next(width for width in _HALF_WIDTHS if width >= n)
        launch(
            "half_matmul",
            f"half_matmul_n{width}",
            _DECODE_THREADS,
            (-(-weight.shape[0] // _HALF_ROWS), 1, 1),
            HalfProduct(
                weights=weight.data_ptr(),
                x=x.data_ptr(),
                y=out.data_ptr(),
                bias=address(bias),
                y_stride=out.stride(0),
                rows=weight.shape[0],
                columns=columns,
                n=n,
                y_is_half=is_half(out),
            ),
            x,
            f"float16 {list(weight.shape)}, {n} rows of x",
        )
    return out
