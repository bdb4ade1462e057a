"""Plain torch code for everything that a kernel computes, on CPU and CUDA. Tests compare the kernels with it, and the
operations of `ops` use it for tensors on the CPU.

Weights are dequantised in float32, as the GGUF specification of each type says. Products with quantised weights and
attention are computed in float64, products with float16 weights in float32.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from sglang_pascal.kernels.formats import BLOCK, FORMATS, GROUP_ROWS, PLANE_BYTES, TILE_COLUMNS, tiles

INT8_MAX: Final = 127
LOW_STEPS: Final = 256
"""Steps of the low int8 of 16-bit activations in one of the high int8: -128..127 spans a rounding error."""
TINY: Final = 1e-30
"""A block of activations whose largest magnitude is below this counts as zero."""


# ---- weights -------------------------------------------------------------------------------------------------------


def repack_ref(raw: torch.Tensor, tensor_type: str) -> torch.Tensor:
    """Pack rows of a GGUF tensor, uint8 `[rows, row_bytes]`, into the device layout, uint8 `[packed_bytes]`."""
    form = FORMATS[tensor_type]
    rows, row_bytes = raw.shape
    records = form.records(row_bytes // form.block_bytes * form.block_weights)
    groups = -(-rows // GROUP_ROWS)
    padded = raw.new_zeros(groups * GROUP_ROWS, records * form.record_row_bytes)
    padded[:rows, :row_bytes] = raw ^ _flip_mask(tensor_type, row_bytes, raw.device)
    source = padded.view(groups, GROUP_ROWS, records, form.record_row_bytes)[..., _plane_order(tensor_type, raw.device)]
    whole = form.record_row_bytes // PLANE_BYTES * PLANE_BYTES
    planes = source[..., :whole].reshape(groups, GROUP_ROWS, records, -1, PLANE_BYTES).permute(0, 2, 3, 1, 4)
    tail = source[..., whole:].permute(0, 2, 1, 3)
    return torch.cat([planes.flatten(2), tail.flatten(2)], dim=2).flatten()


def unrepack_ref(packed: torch.Tensor, tensor_type: str, rows: int, columns: int) -> torch.Tensor:
    """Return the rows of a packed tensor, uint8 `[rows, row_bytes]`: the inverse of `repack_ref`."""
    form = FORMATS[tensor_type]
    groups, records, row_bytes = -(-rows // GROUP_ROWS), form.records(columns), form.row_bytes(columns)
    whole = form.record_row_bytes // PLANE_BYTES * PLANE_BYTES
    units = packed.view(groups, records, form.record_bytes)
    planes = units[..., : whole * GROUP_ROWS].reshape(groups, records, -1, GROUP_ROWS, PLANE_BYTES)
    tail = units[..., whole * GROUP_ROWS :].reshape(groups, records, GROUP_ROWS, -1)
    source = torch.cat([planes.permute(0, 3, 1, 2, 4).flatten(3), tail.permute(0, 2, 1, 3)], dim=3)
    result = torch.empty_like(source)
    result[..., _plane_order(tensor_type, packed.device)] = source
    result = result.reshape(groups * GROUP_ROWS, -1)[:rows, :row_bytes]
    return result ^ _flip_mask(tensor_type, row_bytes, packed.device)


def _plane_order(tensor_type: str, device: torch.device) -> torch.Tensor:
    """Return, for each byte of a record's row in the device's order, its index in the file."""
    form = FORMATS[tensor_type]
    if not form.short_tiles:
        return torch.arange(form.record_row_bytes, device=device)
    halves = (form.block_bytes % PLANE_BYTES) // 2  # fp16 numbers at the start of a block: d, and m of Q4_1
    blocks = torch.arange(form.record_row_bytes, device=device).view(-1, form.block_bytes)
    heads = [blocks[:, 2 * h : 2 * h + 2].flatten() for h in range(halves)]
    return torch.cat([blocks[:, 2 * halves :].flatten(), *heads])


def _flip_mask(tensor_type: str, row_bytes: int, device: torch.device) -> torch.Tensor:
    """Return the bits in each byte of a row that the device layout inverts."""
    form = FORMATS[tensor_type]
    mask = torch.zeros(form.block_bytes, dtype=torch.uint8, device=device)
    if tensor_type == "Q6_K":
        mask[128:192] = 0xAA
    elif tensor_type == "Q4_0":
        mask[2:] = 0x88
    return mask.repeat(row_bytes // form.block_bytes)


def dequantize_ref(raw: torch.Tensor, tensor_type: str) -> torch.Tensor:
    """Return the rows of a GGUF tensor, uint8 `[rows, row_bytes]`, as float32 `[rows, columns]`."""
    form = FORMATS[tensor_type]
    blocks = raw.reshape(-1, form.block_bytes)
    return _DEQUANTIZE[tensor_type](blocks).reshape(raw.shape[0], -1)


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(quants: torch.Tensor) -> torch.Tensor:
    """Unpack `[n, bytes]` to `[n, 2 * bytes]`: all low nibbles, then all high ones."""
    return torch.cat([quants & 15, quants >> 4], dim=1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and minimum of each of the eight sub-blocks of Q4_K and Q5_K: `[n, 8]`."""
    packed = blocks[:, 4:16]
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    mins = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * mins.float()


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, mins = _k_scales(blocks)
    quants = torch.stack([_nibbles(blocks[:, 16 + 32 * pair : 48 + 32 * pair]) for pair in range(4)], dim=1)
    return scales[:, :, None] * quants.view(-1, 8, 32).float() - mins[:, :, None]


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, mins = _k_scales(blocks)
    quants = torch.stack([_nibbles(blocks[:, 48 + 32 * pair : 80 + 32 * pair]) for pair in range(4)], dim=1)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[None, :, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    return scales[:, :, None] * (quants.view(-1, 8, 32) | fifth << 4).float() - mins[:, :, None]


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = blocks[:, :128].view(-1, 2, 2, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3
    quants = torch.cat([low & 15, low >> 4], dim=2) | high << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scales[:, :, None] * (quants.reshape(-1, 16, 16).float() - 32)


_DEQUANTIZE: Final = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


# ---- activations ---------------------------------------------------------------------------------------------------


def quantize_ref(x: torch.Tensor, *, is_16_bit: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[n, columns]` to int8 `[n, K]` and float32 `[n, K / 32, 2]` of (d, d * sum q); K is padded to 256.

    is_16_bit: the result has twice as many rows. The second half holds the rounding error of the first, in 256ths of
    its steps; its sums are of both: d * (256 * sum of the high q + sum of the low q).
    """
    padded = torch.nn.functional.pad(x.float(), (0, tiles(x.shape[1]) * TILE_COLUMNS - x.shape[1]))
    blocks = padded.view(x.shape[0], padded.shape[1] // BLOCK, BLOCK)
    # The largest magnitude as bits, because NaN is then above infinity.
    amax = (blocks.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True).view(torch.float32)
    zero = amax < TINY
    d = torch.where(zero, 0.0, amax / INT8_MAX)
    # One division. torch computes `127 / amax` as a reciprocal and a product, which rounds differently.
    steps = blocks * torch.where(zero, 0.0, torch.full_like(amax, INT8_MAX).div(amax))
    q = steps.round().nan_to_num(0.0)
    parts = [(q, d, q)]
    if is_16_bit:
        low = ((steps - q) * LOW_STEPS).round().nan_to_num(0.0).clamp(-INT8_MAX - 1, INT8_MAX)
        parts.append((low, d / LOW_STEPS, LOW_STEPS * q + low))
    values = torch.cat([q for q, _, _ in parts])
    scales = torch.cat([torch.cat([d, d * whole.sum(-1, keepdim=True)], dim=-1) for _, d, whole in parts])
    return values.to(torch.int8).flatten(1), scales


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight in float32."""
    x = x.float()
    mean_square: torch.Tensor = x.square().mean(-1, keepdim=True)
    return x * (mean_square + eps).sqrt().reciprocal() * weight.float()


def silu_mul_ref(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of `[n, 2 * columns]`, gate first, in float32."""
    gate, up = x.float().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


# ---- products ------------------------------------------------------------------------------------------------------


def quantized_matmul_ref(
    q: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, *, is_16_bit: bool = False
) -> torch.Tensor:
    """Return quantised activations x dequantised weights `[rows, columns]`: float64 `[n, rows]`.

    is_16_bit: of 2n rows, the high and the low int8 of n.
    """
    x = (q.view(*scales.shape[:2], BLOCK).double() * scales[..., :1].double()).flatten(1)
    if is_16_bit:
        high, low = x.chunk(2)
        x = high + low
    return x[:, : weights.shape[1]] @ weights.double().T


def half_matmul_ref(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply x `[n, columns]` by weights `[rows, columns]`: float32 `[n, rows]`."""
    return x.float() @ weights.float().T


# ---- KV pool -------------------------------------------------------------------------------------------------------


def rope_ref(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, *, is_neox: bool) -> torch.Tensor:
    """Rotate x `[n, heads, head_dim]` by position, float32. cos_sin `[positions, rotary_dim]`: cosines, then sines."""
    rotary_dim = cos_sin.shape[1]
    cosine, sine = cos_sin[positions].float()[:, None].chunk(2, dim=-1)
    turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:].float()
    first, second = turned.chunk(2, dim=-1) if is_neox else (turned[..., ::2], turned[..., 1::2])
    parts = (first * cosine - second * sine, second * cosine + first * sine)
    rotated = torch.cat(parts, dim=-1) if is_neox else torch.stack(parts, dim=-1).flatten(-2)
    return torch.cat([rotated, rest], dim=-1)


def quantize_kv_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[..., head_dim]` to int8 with one fp16 scale per vector `[...]`."""
    scale = (x.float().abs().amax(-1) / INT8_MAX).half()
    spread = scale.float()[..., None]
    q = torch.where(spread > 0, x.float() / spread, 0.0).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8), scale


def read_pool_ref(pool: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
    """Return slots of a pool `[slots, kv_heads, head_dim]` as float64. scales `[slots, kv_heads]` for int8."""
    if pool.dtype == torch.float8_e5m2:
        return pool.view(torch.uint8)[slots].view(pool.dtype).double()
    values = pool[slots].double()
    return values if scales is None else values * scales[slots].double()[..., None]


# ---- attention -----------------------------------------------------------------------------------------------------


def attention_ref(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Return causal attention of one sequence, in float64.

    query: `[new, heads, D]`, the last positions. keys, values: `[length, kv_heads, D]`. window: number of earlier
    positions that a query sees; None = all.
    """
    n_new, heads, _ = query.shape
    length = keys.shape[0]
    keys, values = (t.repeat_interleave(heads // keys.shape[1], dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    own = torch.arange(length - n_new, length, device=query.device)[:, None]
    position = torch.arange(length, device=query.device)[None]
    hidden = position > own
    if window is not None:
        hidden |= position < own - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), values)


# ---- sampling ------------------------------------------------------------------------------------------------------


def argmax_ref(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest value in each row of `[n, vocabulary]`: the first of equals; NaN is largest."""
    return logits.argmax(-1)


def top_k_top_p_filter_ref(
    probabilities: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zero all values outside the top k, the nucleus p and min_p x the largest; scale the rest to sum 1.

    Values equal to the smallest kept value stay.
    """
    ordered, _ = probabilities.sort(dim=-1, descending=True)
    threshold = torch.zeros_like(ordered[:, :1])
    if top_k is not None:
        last = (top_k.long().clamp(1, ordered.shape[1]) - 1)[:, None]
        threshold = torch.maximum(threshold, ordered.gather(1, last))
    if top_p is not None:
        cumulative = ordered.double().cumsum(-1)
        before = (cumulative < top_p[:, None].double() * cumulative[:, -1:]).sum(-1, keepdim=True)
        nucleus = ordered.gather(1, before.clamp(max=ordered.shape[1] - 1))
        threshold = torch.where(top_p[:, None] < 1, torch.maximum(threshold, nucleus), threshold)
    if min_p is not None:
        threshold = torch.maximum(threshold, min_p[:, None] * ordered[:, :1])
    kept = torch.where(probabilities >= threshold, probabilities, 0.0)
    return kept / kept.sum(-1, keepdim=True)
