"""Compares every operation with its reference on the first device: `sglang-pascal selftest`.

A case computes a result with `ops` and again with `reference`, and returns their difference as a share of the limit: at
most 1 passes. The limits follow from the arithmetic, not from observed results:

- moving bytes, dequantising, quantising given values, argmax: the same bits
- products: 1e-6 of the sum of |w * x|; the integers are exact, so only the additions of block sums round
- normed, rotated or activated values that are then quantised: an integer may differ by one where the value lies between
- attention in float32: 2e-5 of the largest value; ex2.approx and the order of additions
- the same product in another batch, launch or CUDA graph: the same bits

On a card newer than Pascal the driver first compiles every kernel, which takes minutes in one process; `--jobs` spreads
the cases over several. Cases that use the same kernels run in the same process.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Final

import torch

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.build import HEAD_DIMS
from sglang_pascal.kernels.formats import FORMATS, TILE_COLUMNS
from sglang_pascal.ops.activations import Activations, quantize, rms_norm, rms_norm_quantize, silu_mul_quantize
from sglang_pascal.ops.attention import SPLITS, Sequences, attention_decode, attention_prefill
from sglang_pascal.ops.kv_cache import KvPool, rope_and_store
from sglang_pascal.ops.matmul import every_kernel, matmul, matmul_half
from sglang_pascal.ops.sampling import argmax, top_k_top_p_filter_
from sglang_pascal.ops.weights import dequantize, pack, unpack
from sglang_pascal.reference import (
    LOW_STEPS,
    argmax_ref,
    attention_ref,
    dequantize_ref,
    quantize_kv_ref,
    quantize_ref,
    quantized_matmul_ref,
    read_pool_ref,
    repack_ref,
    rms_norm_ref,
    rope_ref,
    silu_mul_ref,
    top_k_top_p_filter_ref,
)

PRODUCT_LIMIT: Final = 1e-6
ATTENTION_LIMIT: Final = 2e-5
HALF_ULP: Final = 2**-10
"""Distance of neighbouring float16 numbers, relative."""
_SCALE_OFFSETS: Final = {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
}
"""Where a block of each type has its float16 numbers."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    name: str
    error: float
    """Difference from the reference as a share of the limit; NaN = the comparison itself is broken."""
    seconds: float
    failure: str = ""
    """The exception if there is no result: the driver refused a kernel, or a launch failed."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= 1


Case = Callable[[torch.device], float]


def random_blocks(tensor_type: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return rows of a GGUF tensor with random bits and scales of about 0.01, uint8 `[rows, row_bytes]` on the CPU."""
    form = FORMATS[tensor_type]
    generator = torch.Generator().manual_seed(seed)
    n_blocks = rows * (columns // form.block_weights)
    blocks = torch.randint(0, 256, (n_blocks, form.block_bytes), dtype=torch.uint8, generator=generator)
    for offset in _SCALE_OFFSETS[tensor_type]:
        scales = (torch.rand(n_blocks, 1, generator=generator) * 0.02 - 0.01).half()
        blocks[:, offset : offset + 2] = scales.view(torch.uint8)
    return blocks.view(rows, -1)


def extreme_blocks(tensor_type: str) -> torch.Tensor:
    """Return one block per row, filled with one byte, for some bytes and some scales: zero, denormal, largest."""
    form = FORMATS[tensor_type]
    per_row = max(1, TILE_COLUMNS // form.block_weights)
    rows = []
    for byte, scale in itertools.product((0, 0x55, 0x80, 0xFF), (0.0, 6e-8, -6e-8, 1.0, 65504.0)):
        block = torch.full((form.block_bytes,), byte, dtype=torch.uint8)
        for offset in _SCALE_OFFSETS[tensor_type]:
            block[offset : offset + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
        rows.append(block.repeat(per_row))
    return torch.stack(rows)


def _normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return 0 if equal (NaN equals NaN), infinity if not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    a, b = a.cpu(), b.cpu()
    equal = (a == b) | ((a != a) & (b != b))
    return 0.0 if bool(equal.all()) else float("inf")


def _share(value: torch.Tensor, expected: torch.Tensor, limit: torch.Tensor | float) -> float:
    """Return the largest difference as a share of the limit."""
    allowed = torch.as_tensor(limit, dtype=torch.float64)
    difference = (value.double().cpu() - expected.double().cpu()).abs()
    return float((difference / allowed.clamp(min=1e-300)).max()) if difference.numel() else 0.0


# ---- weights -------------------------------------------------------------------------------------------------------


def _shapes(tensor_type: str) -> list[tuple[int, int]]:
    """Return row counts that are no multiples of 32, and columns that end within a tile if the type allows it."""
    return [(1, 256), (33, 768), (96, 2304), *_short_matrices(tensor_type)]


def _repack(device: torch.device, tensor_type: str) -> float:
    errors = []
    for raw in (*(random_blocks(tensor_type, *shape) for shape in _shapes(tensor_type)), extreme_blocks(tensor_type)):
        columns = raw.shape[1] // FORMATS[tensor_type].block_bytes * FORMATS[tensor_type].block_weights
        weight = pack(raw.to(device), tensor_type, columns)
        errors += [_same_bits(weight.data, repack_ref(raw, tensor_type)), _same_bits(unpack(weight), raw)]
    return max(errors)


def _dequantize(device: torch.device, tensor_type: str) -> float:
    errors = []
    for raw in (*(random_blocks(tensor_type, *shape) for shape in _shapes(tensor_type)), extreme_blocks(tensor_type)):
        values = dequantize_ref(raw, tensor_type)
        weight = pack(raw.to(device), tensor_type, values.shape[1])
        errors += [
            _same_bits(dequantize(weight, torch.float32), values),
            _same_bits(dequantize(weight, torch.float16), values.half()),
        ]
        for dtype in (torch.int32, torch.int64):
            ids = torch.tensor([raw.shape[0] - 1, 0, -1, raw.shape[0], 0], dtype=dtype)
            expected = values[ids.clamp(0, raw.shape[0] - 1)]
            expected[2:4] = torch.nan
            errors.append(_same_bits(dequantize(weight, torch.float32, ids.to(device)), expected))
    return max(errors)


# ---- activations ---------------------------------------------------------------------------------------------------


def _awkward(rows: int, columns: int) -> torch.Tensor:
    """Return normal values with a zero block, a tiny one, outliers and float16's largest number."""
    x = _normal(rows, columns)
    x[0, :32] = 0
    x[-1, :16] *= 1e-20
    x[:, 7::97] *= 40
    x[0, -1] = 65504
    return x


def _activation_error(result: Activations, expected: tuple[torch.Tensor, torch.Tensor], *, exact: bool) -> float:
    q, scales = expected
    if exact:
        return max(_same_bits(result.q, q), _same_bits(result.scales, scales))
    steps = (result.q.cpu().int() - q.int()).abs()
    moved = float((steps > 0).float().mean()) / 1e-3  # where a value lies between two integers: rare
    relative = _share(result.scales[..., 0], scales[..., 0], scales[..., 0].abs().double() * 1e-5 + 1e-35)
    own = result.scales[..., 0].cpu() * result.q.cpu().view(*scales.shape[:2], 32).float().sum(-1)
    return max(float(steps.max()), moved, relative, _same_bits(result.scales[..., 1], own))


_COLUMNS: Final = (32, 96, 256, 576, 2560)


def _quantize(device: torch.device) -> float:
    errors = []
    for columns, dtype in itertools.product(_COLUMNS, (torch.float32, torch.float16)):
        x = _awkward(3, columns).to(dtype)
        errors.append(_activation_error(quantize(x.to(device)), quantize_ref(x), exact=True))
    return max(errors)


def _silu_mul(device: torch.device) -> float:
    errors = []
    for columns, dtype in itertools.product(_COLUMNS, (torch.float32, torch.float16)):
        x = _normal(5, 2 * columns).to(dtype) * 3
        result = silu_mul_quantize(x.to(device))
        errors.append(_activation_error(result, quantize_ref(silu_mul_ref(x)), exact=False))
    return max(errors)


def _quantize_to_16_bits(device: torch.device) -> float:
    """Two int8 hold each value within a 256th of a step of one, whichever operation quantised it."""
    errors = []
    for columns, dtype in itertools.product(_COLUMNS, (torch.float32, torch.float16)):
        x, weight = _normal(5, columns).to(dtype) * 3, _normal(1, columns, seed=4)[0].to(dtype)
        gate_up = _normal(5, 2 * columns, seed=6).to(dtype)
        normed = torch.empty_like(x, device=device)
        norm = rms_norm_quantize(x.to(device), weight.to(device), 1e-6, is_16_bit=True, output=normed)
        wanted = rms_norm_ref(x, weight, 1e-6)
        errors += [
            _error_of_16_bits(quantize(x.to(device), is_16_bit=True), x.float()),
            _error_of_16_bits(silu_mul_quantize(gate_up.to(device), is_16_bit=True), silu_mul_ref(gate_up)),
            _error_of_16_bits(norm, wanted),
            _share(normed, wanted, wanted.abs() * (HALF_ULP if dtype == torch.float16 else 1e-5) + 1e-6),
        ]
    return max(errors)


def _error_of_16_bits(result: Activations, wanted: torch.Tensor) -> float:
    n, columns = wanted.shape
    values = (result.q.cpu().view(2 * n, -1, 32).double() * result.scales[..., :1].cpu().double()).flatten(1)
    padded = torch.nn.functional.pad(wanted.double(), (0, values.shape[1] - columns))
    largest = padded.view(n, -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    return _share(values[:n] + values[n:], padded, largest * (1 / 127 / LOW_STEPS + 1e-5) + 2e-30)


def _rms_norm(device: torch.device) -> float:
    errors = []
    for columns, dtype in itertools.product(_COLUMNS, (torch.float32, torch.float16)):
        x, residual, weight = (_normal(n, columns, seed=n).to(dtype) for n in (3, 3, 1))
        total = (x.float() + residual.float()).to(dtype)
        kept = residual.to(device)
        result = rms_norm_quantize(x.to(device), weight[0].to(device), 1e-6, kept)
        expected = rms_norm_ref(total, weight[0], 1e-6)
        plain = rms_norm(x.to(device), weight[0].to(device), 1e-6)
        limit = rms_norm_ref(x, weight[0], 1e-6).abs() * (HALF_ULP if dtype == torch.float16 else 1e-5) + 1e-6
        errors += [
            _activation_error(result, quantize_ref(expected), exact=False),
            _same_bits(kept, total),
            _share(plain, rms_norm_ref(x, weight[0], 1e-6), limit),
        ]
    return max(errors)


def _not_a_number(device: torch.device) -> float:
    """NaN and infinity in x must show in every result that depends on it, and in no other row."""
    weight = pack(random_blocks("Q4_K", 40, 512).to(device), "Q4_K", 512)
    x = _normal(20, 512)
    x[3, 100], x[5, 200], x[7, 300] = torch.nan, torch.inf, -torch.inf
    broken = torch.zeros(20, dtype=torch.bool)
    broken[[3, 5, 7]] = True
    results = [
        matmul(quantize(x[:16].to(device)), weight, dtype=torch.float32),
        matmul(quantize(x.to(device)), weight, dtype=torch.float32),
        matmul(quantize(x.to(device), is_16_bit=True), weight, is_16_bit=True, dtype=torch.float32),
        matmul(quantize(x.repeat(4, 1).to(device), is_16_bit=True), weight, is_16_bit=True, dtype=torch.float32)[:20],
        rms_norm(x.to(device), torch.ones(512, device=device), 1e-6),
    ]
    right = True
    for result in results:
        finite = torch.isfinite(result.cpu())
        rows = broken[: len(result)]
        right = right and bool(finite[~rows].all()) and not bool(finite[rows].all(dim=1).any())
    return 0.0 if right else float("inf")


# ---- products ------------------------------------------------------------------------------------------------------

_MATRICES: Final = ((1, 256), (33, 768), (130, 1280), (320, 4608), (64, 14336))
"""Rows and columns: fewer tiles than slices, a last tile row, K in splits, and the widest layer of an 8B model."""
_SHORT_MATRICES: Final = ((70, 96), (33, 576), (40, 960), (320, 4672))
"""Of types with blocks of 32: the last tile has 96, 64, 192 and 64 of 256 columns. The last matrix is cut in splits."""
_COUNTS: Final = (1, 7, 33, 65, 150)
"""Rows of x for which the kernels are chosen as in a model; every kernel also multiplies as many as it is made for."""


def _short_matrices(tensor_type: str) -> tuple[tuple[int, int], ...]:
    return _SHORT_MATRICES if FORMATS[tensor_type].short_tiles else ()


def _product(device: torch.device, tensor_type: str, rows: int, columns: int) -> float:
    raw = random_blocks(tensor_type, rows, columns)
    values = dequantize_ref(raw, tensor_type)
    weight = pack(raw.to(device), tensor_type, columns)
    x = _awkward(max(_COUNTS), columns)
    x[0, -1] = 3
    errors = []
    for is_16_bit in (False, True):
        expected = quantized_matmul_ref(*quantize_ref(x, is_16_bit=is_16_bit), values, is_16_bit=is_16_bit)
        size = quantized_matmul_ref(*_magnitudes(quantize_ref(x)), values.abs())
        multiply = functools.partial(matmul, weight=weight, is_16_bit=is_16_bit, dtype=torch.float32)
        widest = multiply(quantize(x.to(device), is_16_bit=is_16_bit))
        kernels = [(part.n, part) for part in every_kernel(16 if is_16_bit else 8)] if device.type == "cuda" else []
        for n, only in [*((n, None) for n in _COUNTS), *kernels]:
            some = quantize(x[-n:].to(device), is_16_bit=is_16_bit)
            y = multiply(some, only=only)
            errors += [
                _share(y, expected[-n:], size[-n:] * PRODUCT_LIMIT + 1e-30),
                _same_bits(y, widest[-n:]) if device.type == "cuda" else 0.0,
                _same_bits(y, multiply(some, only=only)),
            ]
    return max(errors)


def _magnitudes(activations: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return activations[0].int().abs().to(torch.int16), activations[1]


def _product_of_extremes(device: torch.device, tensor_type: str) -> float:
    raw = extreme_blocks(tensor_type)
    values = dequantize_ref(raw, tensor_type)
    weight = pack(raw.to(device), tensor_type, values.shape[1])
    x = torch.cat([torch.ones(1, TILE_COLUMNS), -torch.ones(1, TILE_COLUMNS), _normal(20, TILE_COLUMNS)])
    x = x[:, : values.shape[1]]
    size = quantized_matmul_ref(*_magnitudes(quantize_ref(x)), values.abs())
    # A value is d * q - m: both parts may be far larger than their difference.
    size += quantized_matmul_ref(*_magnitudes(quantize_ref(x)), values.abs().amax(1, keepdim=True).expand_as(values))
    size += _largest_part(raw, tensor_type) * x.abs().sum(1, keepdim=True)
    errors = []
    for n, is_16_bit in itertools.product((2, 22), (False, True)):
        y = matmul(quantize(x[:n].to(device), is_16_bit=is_16_bit), weight, is_16_bit=is_16_bit, dtype=torch.float32)
        wanted = quantized_matmul_ref(*quantize_ref(x[:n], is_16_bit=is_16_bit), values, is_16_bit=is_16_bit)
        errors.append(_share(y, wanted, size[:n] * PRODUCT_LIMIT + 1e-30))
    return max(errors)


def _largest_part(raw: torch.Tensor, tensor_type: str) -> torch.Tensor:
    """Return a bound of |d * q| + |m| for each row of `extreme_blocks`: scale 63, quant 31 for types with a minimum."""
    offset = _SCALE_OFFSETS[tensor_type][0]
    d = raw[:, offset : offset + 2].contiguous().view(torch.float16).double().abs().T
    return d * (63.0 * 32 if FORMATS[tensor_type].has_min else 0.0)


def _epilogue(device: torch.device) -> float:
    """Bias, residual, float16 results, results that are columns of a wider matrix, and the sum of both halves of x."""
    errors = []
    raw = random_blocks("Q8_0", 100, 512)
    values, weight = dequantize_ref(raw, "Q8_0"), pack(raw.to(device), "Q8_0", 512)
    for n, dtype in itertools.product((1, 16, 40, 70), (torch.float32, torch.float16)):
        x, bias, residual = _normal(n, 512), _normal(100), _normal(n, 100, seed=5).to(dtype)
        room = torch.full((n, 160), 7.0, dtype=dtype, device=device)
        room_residual = torch.zeros(n, 130, dtype=dtype, device=device)
        room_residual[:, :100] = residual.to(device)
        multiply = functools.partial(matmul, bias=bias.to(device), residual=room_residual[:, :100])
        multiply(quantize(x.to(device)), weight, out=room[:, 30:130])
        expected = quantized_matmul_ref(*quantize_ref(x), values) + bias + residual
        halves = multiply(quantize(x.to(device), is_16_bit=True), weight, is_16_bit=True, dtype=dtype)
        size = quantized_matmul_ref(*_magnitudes(quantize_ref(x)), values.abs()) + bias.abs() + residual.abs()
        rounding = HALF_ULP if dtype == torch.float16 else 0.0
        errors += [
            _share(room[:, 30:130], expected, size * PRODUCT_LIMIT + expected.abs() * rounding),
            _same_bits(room[:, :30].cpu(), torch.full((n, 30), 7.0, dtype=dtype)),
            _same_bits(room[:, 130:].cpu(), torch.full((n, 30), 7.0, dtype=dtype)),
            _share(halves, x @ values.T + bias + residual, size * 1e-4 + expected.abs() * rounding),
        ]
    return max(errors)


def _tiles_in_turn(device: torch.device, tensor_type: str) -> float:
    """More tiles than a card has room for, several launches one behind the other: each must take all tiles once."""
    rows, columns, n = 2080, 256, 1250  # 340 tiles of 128 x 64; the largest cards hold fewer than 300
    raw, x = random_blocks(tensor_type, rows, columns), _normal(n, columns)
    values, weight = dequantize_ref(raw, tensor_type), pack(raw.to(device), tensor_type, columns)
    size = quantized_matmul_ref(*_magnitudes(quantize_ref(x)), values.abs())
    errors = []
    for is_16_bit in (False, True):
        expected = quantized_matmul_ref(*quantize_ref(x, is_16_bit=is_16_bit), values, is_16_bit=is_16_bit)
        some = quantize(x.to(device), is_16_bit=is_16_bit)
        results = [matmul(some, weight, is_16_bit=is_16_bit, dtype=torch.float32) for _ in range(3)]
        errors += [_share(results[0], expected, size * PRODUCT_LIMIT + 1e-30)]
        errors += [_same_bits(results[0], other) for other in results[1:]]
    return float("inf") if weight.tickets.any() else max(errors)


def _half_product(device: torch.device) -> float:
    errors = []
    for (rows, columns), n in itertools.product(((1, 8), (50, 576), (130, 4096)), (1, 3, 8, 16)):
        x, weight, bias = _normal(n, columns).half(), _normal(rows, columns, seed=2).half(), _normal(rows)
        out = torch.empty(n, rows, device=device)
        matmul_half(x.to(device), weight.to(device), bias=bias.to(device), out=out)
        expected = x.double() @ weight.double().T + bias
        size = x.double().abs() @ weight.double().abs().T + bias.abs()
        errors.append(_share(out, expected, size * PRODUCT_LIMIT))
    return max(errors)


# ---- KV pool and attention -----------------------------------------------------------------------------------------


def _empty_pool(kind: str, slots: int, kv_heads: int, head_dim: int, device: torch.device) -> KvPool:
    dtype = {"F16": torch.float16, "E5M2": torch.float8_e5m2, "INT8": torch.int8}[kind]
    keys, values = (torch.zeros(slots, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
    if kind != "INT8":
        return KvPool(keys, values)
    scales = [torch.zeros(slots, kv_heads, dtype=torch.float16, device=device) for _ in range(2)]
    return KvPool(keys, values, *scales)


def _filled_pool(kind: str, slots: int, kv_heads: int, head_dim: int, device: torch.device) -> KvPool:
    pool = _empty_pool(kind, slots, kv_heads, head_dim, device)
    for i, (buffer, scales) in enumerate(((pool.keys, pool.key_scales), (pool.values, pool.value_scales))):
        x = _normal(slots, kv_heads, head_dim, seed=20 + i)
        if scales is not None:
            q, scale = quantize_kv_ref(x)
            buffer.copy_(q), scales.copy_(scale)
        else:
            buffer.copy_(x.half().to(buffer.dtype))
    return pool


def _rope(device: torch.device, kind: str) -> float:
    errors = []
    for head_dim, is_neox, with_norm, dtype in itertools.product(
        HEAD_DIMS, (True, False), (True, False), (torch.float32, torch.float16)
    ):
        heads, kv_heads, n = 6, 2, 5
        qkv = _normal(n, (heads + 2 * kv_heads) * head_dim).to(dtype)
        norms = [_normal(head_dim, seed=seed).to(dtype) if with_norm else None for seed in (3, 4)]
        positions = torch.tensor([0, 1, 17, 99, 50])
        slots = torch.tensor([9, 3, -1, 0, 7], dtype=torch.int32)
        angles = torch.arange(100)[:, None] / 10000 ** (torch.arange(head_dim // 4) / (head_dim // 4))
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)  # half of each head is rotated
        pool = _empty_pool(kind, 12, kv_heads, head_dim, device)
        q_norm, k_norm = (None if norm is None else norm.to(device) for norm in norms)
        queries = rope_and_store(
            qkv.to(device),
            positions.to(device),
            slots.to(device),
            cos_sin.to(device),
            pool,
            is_neox=is_neox,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=1e-6,
        )
        q, k, v = torch.split(qkv.view(n, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
        q, k = (
            rope_ref(x.float() if norm is None else rms_norm_ref(x, norm, 1e-6), positions, cos_sin, is_neox=is_neox)
            for x, norm in zip((q, k), norms, strict=True)
        )
        rounding = HALF_ULP if dtype == torch.float16 else 2e-6
        errors.append(_share(queries, q, q.abs().double() * rounding + 4e-6))
        errors.append(_pool_error(pool, slots, k.to(dtype), v, rounding))
    return max(errors)


def _pool_error(pool: KvPool, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rounding: float) -> float:
    """Return the error of the written slots, of which the pool type's rounding is allowed; others must not change."""
    errors = []
    written = slots[slots >= 0].long()
    own = {"F16": HALF_ULP, "E5M2": 2**-2, "INT8": 1.01 / 127}[pool.kind]
    for buffer, scales, x in ((pool.keys, pool.key_scales, keys), (pool.values, pool.value_scales, values)):
        stored = read_pool_ref(buffer.cpu(), None if scales is None else scales.cpu(), torch.arange(len(buffer)))
        expected = torch.zeros_like(stored)
        expected[written] = x[slots >= 0].double()
        size = expected.abs().amax(-1, keepdim=True) if pool.kind == "INT8" else expected.abs()
        errors.append(_share(stored, expected, size * (own + rounding) + 2e-5 * (size > 0) + 1e-30))
    return max(errors)


def _batch(lengths: list[int], device: torch.device) -> tuple[Sequences, int]:
    """Return sequences whose slots are scattered over a pool, and the number of the pool's slots."""
    total = sum(lengths) + 7
    order = torch.randperm(total, generator=torch.Generator().manual_seed(3)).int()
    table = torch.full((len(lengths) + 2, max(lengths) + 5), 2**30, dtype=torch.int32)  # never to be read
    requests = torch.arange(len(lengths)).flip(0) + 1
    start = 0
    for request, length in zip(requests, lengths, strict=True):
        table[request, :length] = order[start : start + length]
        start += length
    return Sequences(table.to(device), requests.to(device), torch.tensor(lengths, device=device)), total


_DECODE_LENGTHS: Final = [0, 1, 31, 32, 33, 255, *(longest + more for longest in SPLITS for more in (0, 1))]
"""Around the lengths at which the number of positions in a split changes."""
_VARIANTS: Final = ((None, 0.0), (100, 0.0), (None, 5.0), (0, 0.0))
"""Window and soft cap."""


def _decode(device: torch.device, kind: str, head_dim: int) -> float:
    sequences, slots = _batch(_DECODE_LENGTHS, device)
    errors = []
    for kv_heads, group in ((2, 1), (3, 2), (1, 3), (2, 7), (1, 8), (1, 12)):
        pool = _filled_pool(kind, slots, kv_heads, head_dim, device)
        query = _normal(len(sequences), kv_heads * group, head_dim)
        for window, soft_cap in _VARIANTS:
            attend = functools.partial(
                attention_decode,
                scale=head_dim**-0.5,
                max_length=max(_DECODE_LENGTHS) + 300,
                window=window,
                soft_cap=soft_cap,
            )
            out = attend(query.to(device), pool, sequences)
            assert isinstance(out, torch.Tensor)
            expected = _expected(query, pool, sequences, [1] * len(sequences), head_dim, window, soft_cap)
            again = attend(query.to(device), pool, sequences)
            activations = attend(query.to(device), pool, sequences, quantized=True)
            both = attend(query.to(device), pool, sequences, quantized=True, is_16_bit=True)
            assert isinstance(activations, Activations)
            assert isinstance(both, Activations)
            assert isinstance(again, torch.Tensor)
            errors += [
                _share(out, expected.flatten(1), ATTENTION_LIMIT * 4),
                _same_bits(out, again),
                _activation_error(activations, quantize_ref(out.cpu()), exact=True),
                _error_of_16_bits(both, out.cpu()),
            ]
    return max(errors)


def _expected(
    query: torch.Tensor,
    pool: KvPool,
    sequences: Sequences,
    new: list[int],
    head_dim: int,
    window: int | None,
    soft_cap: float,
) -> torch.Tensor:
    result = torch.zeros_like(query, dtype=torch.float64)
    start = 0
    for request, length, n_new in zip(sequences.requests.cpu(), sequences.lengths.cpu(), new, strict=True):
        slots = sequences.req_to_token.cpu()[request, : int(length)].long()
        keys, values = (
            read_pool_ref(buffer.cpu(), None if scales is None else scales.cpu(), slots)
            for buffer, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales))
        )
        if length:
            result[start : start + n_new] = attention_ref(
                query[start : start + n_new], keys, values, scale=head_dim**-0.5, window=window, soft_cap=soft_cap
            )
        start += n_new
    return result


def _prefill(device: torch.device, kind: str, head_dim: int) -> float:
    lengths, new = [1, 70, 64, 200, 333], [1, 70, 1, 130, 65]
    sequences, slots = _batch(lengths, device)
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    errors = []
    for kv_heads, group in ((2, 1), (1, 3)):
        pool = _filled_pool(kind, slots, kv_heads, head_dim, device)
        query = _normal(sum(new), kv_heads * group, head_dim)
        for window, soft_cap in _VARIANTS:
            attend = functools.partial(
                attention_prefill, scale=head_dim**-0.5, max_new=max(new), window=window, soft_cap=soft_cap
            )
            out = attend(query.to(device), pool, sequences, starts.to(device))
            again = attend(query.to(device), pool, sequences, starts.to(device))
            half = attend(query.half().to(device), pool, sequences, starts.to(device))
            expected = _expected(query, pool, sequences, new, head_dim, window, soft_cap)
            errors += [
                _share(out, expected.flatten(1), ATTENTION_LIMIT * 4),
                _same_bits(out, again),
                _share(half, expected.flatten(1), 4e-3 * 4),
            ]
    return max(errors)


# ---- sampling ------------------------------------------------------------------------------------------------------


def _argmax(device: torch.device) -> float:
    errors = []
    for vocabulary, dtype in itertools.product((1, 31, 1025, 151936), (torch.float32, torch.float16)):
        logits = _normal(5, vocabulary).to(dtype)
        logits[1] = -torch.inf
        logits[2] = 3.5
        logits[3, vocabulary // 2] = torch.nan
        logits[4, vocabulary - 1] = torch.inf
        errors.append(_same_bits(argmax(logits.to(device)), argmax_ref(logits)))
    return max(errors)


def _filter(device: torch.device) -> float:
    errors = []
    for vocabulary in (5, 1000, 40001):
        probabilities = (_normal(6, vocabulary) * 3).softmax(-1)
        top_k = torch.tensor([1, 3, 50, 2**30, 7, 2], dtype=torch.int32)
        top_p = torch.tensor([1.0, 0.5, 0.9, 0.1, 0.999, 1.0])
        min_p = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.01, 1.0])
        for use in itertools.product((True, False), repeat=3):
            limits = [limit if wanted else None for limit, wanted in zip((top_k, top_p, min_p), use, strict=True)]
            on_device = [None if limit is None else limit.to(device) for limit in limits]
            result = top_k_top_p_filter_(probabilities.clone().to(device), *on_device)
            expected = top_k_top_p_filter_ref(probabilities, *limits)
            # One token at the edge of the nucleus may fall either way: sums of float32 in another order.
            moved = ((result.cpu() > 0) != (expected > 0)).sum(-1).max()
            kept = (result.cpu() > 0) & (expected > 0)
            differences = torch.where(kept, (result.cpu() / expected.clamp(min=1e-30) - 1).abs(), 0.0)
            errors += [float(moved), float(differences.max()) / 2e-3, _share(result.sum(-1), torch.ones(6), 1e-5)]
    return max(errors)


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


def _graph(device: torch.device) -> float:
    """A chain of operations, captured and replayed with other inputs, against the same chain started one by one."""
    if device.type != "cuda":
        return 0.0
    head_dim, heads, kv_heads, n = 64, 4, 2, 3
    columns = heads * head_dim
    sequences, slots = _batch([5, 300, 17], device)
    pool = _filled_pool("INT8", slots, kv_heads, head_dim, device)
    weights = {kind: pack(random_blocks(kind, 512, columns).to(device), kind, columns) for kind in ("Q4_K", "Q6_K")}
    norm = torch.ones(columns, device=device)
    angles = torch.arange(400)[:, None] / 10000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
    x = _normal(n, columns).to(device)

    def chain() -> torch.Tensor:
        qkv = matmul(rms_norm_quantize(x, norm, 1e-6), weights["Q4_K"], dtype=torch.float32)
        new_slots = sequences.req_to_token[sequences.requests, sequences.lengths - 1]
        query = rope_and_store(qkv, sequences.lengths - 1, new_slots, cos_sin, pool, is_neox=True)
        attended = attention_decode(query, pool, sequences, scale=0.125, max_length=512, quantized=True)
        assert isinstance(attended, Activations)
        return argmax(matmul(attended, weights["Q6_K"], dtype=torch.float32)) + 0 * query.sum().long()

    chain()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph):
        result = chain()
    errors = []
    for seed in range(5):
        x.copy_(_normal(n, columns, seed=seed))
        graph.replay()  # type: ignore[no-untyped-call]
        replayed = result.clone()
        errors.append(_same_bits(replayed, chain()))
    return max(errors)


def _all_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for tensor_type in FORMATS:
        cases[f"repack {tensor_type}"] = functools.partial(_repack, tensor_type=tensor_type)
        cases[f"dequantize {tensor_type}"] = functools.partial(_dequantize, tensor_type=tensor_type)
        for rows, columns in (*_MATRICES, *_short_matrices(tensor_type)):
            cases[f"matmul {tensor_type} [{rows}, {columns}]"] = functools.partial(
                _product, tensor_type=tensor_type, rows=rows, columns=columns
            )
        cases[f"matmul {tensor_type} extreme blocks"] = functools.partial(_product_of_extremes, tensor_type=tensor_type)
    for tensor_type in ("Q4_K", "Q8_0"):
        cases[f"matmul {tensor_type} tiles in turn"] = functools.partial(_tiles_in_turn, tensor_type=tensor_type)
    cases |= {"matmul epilogue": _epilogue, "matmul float16": _half_product}
    cases |= {"quantize": _quantize, "silu_mul_quantize": _silu_mul, "rms_norm": _rms_norm}
    cases |= {"quantize to 16 bits": _quantize_to_16_bits}
    cases |= {"NaN and infinity": _not_a_number, "argmax": _argmax, "top_k_top_p_filter": _filter}
    for kind in ("F16", "E5M2", "INT8"):
        cases[f"rope_and_store {kind}"] = functools.partial(_rope, kind=kind)
        for head_dim in HEAD_DIMS:
            name = f"{kind} head_dim {head_dim}"
            cases[f"attention_decode {name}"] = functools.partial(_decode, kind=kind, head_dim=head_dim)
            cases[f"attention_prefill {name}"] = functools.partial(_prefill, kind=kind, head_dim=head_dim)
    cases["CUDA graph"] = _graph
    return cases


CASES: Final = _all_cases()
"""Name -> what computes the error as a share of the limit, on a device."""


def run(device: torch.device, names: list[str] | None = None, jobs: int = 1) -> list[Outcome]:
    """Run all cases, or those whose name starts with one of `names`. jobs: processes that run at once."""
    chosen = [name for name in CASES if names is None or name.startswith(tuple(names))]
    if jobs == 1:
        return _run_cases(device, chosen)
    groups = _by_kernels(chosen)
    # A forked process could not use CUDA that this one has initialised.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = [(group, pool.submit(_run_cases, device, group)) for group in groups]
        done = {outcome.name: outcome for group, future in running for outcome in _outcomes(group, future)}
    return [done[name] for name in chosen]


def _run_cases(device: torch.device, names: list[str]) -> list[Outcome]:
    return [_outcome(name, CASES[name], device) for name in names]


def _outcomes(group: list[str], future: Future[list[Outcome]]) -> list[Outcome]:
    """Return a group's outcomes. If a process was killed, nobody knows by which case, and what it ran is lost."""
    try:
        return future.result()
    except BrokenProcessPool as exc:
        return [Outcome(name, float("nan"), 0.0, f"a process of the selftest died: {exc}") for name in group]


def _by_kernels(names: list[str]) -> list[list[str]]:
    """Divide cases so that those that load the same kernels stay together; the largest group first."""
    groups: dict[str, list[str]] = {}
    for name in names:
        words = name.split()
        key = next((word for word in words if word in FORMATS), "")
        if words[0].startswith("attention"):
            key = " ".join(words[1:])
        groups.setdefault(key, []).append(name)
    return sorted(groups.values(), key=len, reverse=True)


def _outcome(name: str, case: Case, device: torch.device) -> Outcome:
    """Run one case. An exception is its result, so the other cases still run."""
    start, error, failure = time.monotonic(), float("nan"), ""
    try:
        error = case(device)
    except (PluginError, RuntimeError) as exc:
        failure = str(exc)
    return Outcome(name, error, time.monotonic() - start, failure)


def print_selftest(*, as_json: bool, names: list[str] | None = None, jobs: int = 1) -> int:
    """Run on the first visible CUDA device, otherwise on the CPU, whose operations are the references themselves."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (the references themselves)"
    outcomes = run(device, names, jobs)
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    if as_json:
        facts = {"device": where, "failed": failed, "cases": [asdict(outcome) for outcome in outcomes]}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        for outcome in outcomes:
            state = "ok  " if outcome.passed else "FAIL"
            sys.stdout.write(f"{state} {outcome.error:9.3f} of the limit  {outcome.seconds:6.2f} s  {outcome.name}\n")
            if outcome.failure:
                sys.stdout.write(f"     {outcome.failure}\n")
        sys.stdout.write(f"{where}: {len(outcomes) - len(failed)} of {len(outcomes)} cases pass\n")
    return 1 if failed or not outcomes else 0


__all__ = ["CASES", "Outcome", "extreme_blocks", "print_selftest", "random_blocks", "run"]
