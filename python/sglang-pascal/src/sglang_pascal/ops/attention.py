"""Attention over a paged pool: one new token per sequence (decode), or many (prefill).

A sequence is a row of `req_to_token`: the slot of each of its positions. Supports grouped heads, sliding windows and a
soft cap of the scores. A sequence's result does not depend on the others in the batch, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sglang_pascal.kernels.arguments import AttentionCombine, AttentionDecode, AttentionPrefill
from sglang_pascal.kernels.formats import TILE_COLUMNS, tiles
from sglang_pascal.ops._call import FLOATS, INDICES, OperationError, address, is_half, is_long, launch, require
from sglang_pascal.ops.activations import Activations, empty_activations, quantize
from sglang_pascal.reference import attention_ref, read_pool_ref

if TYPE_CHECKING:
    from sglang_pascal.ops.kv_cache import KvPool

SPLITS: Final = {512: 32, 1024: 64, 2048: 128}
"""Longest sequence -> positions that one CTA of a decode reads (`split_of` of kv.cuh)."""
MOST_SPLIT: Final = 256
"""Positions that one CTA reads of longer sequences."""
_GROUPS: Final = (1, 2, 4, 8)
"""Query heads per KV head for which the decode kernels are compiled; other numbers are padded."""
_THREADS: Final = 128
_QUERIES: Final = 64
"""Query rows in one CTA of a prefill kernel."""
_NO_WINDOW: Final = -1


class Sequences:
    """The sequences of a batch, checked once and used by every layer."""

    def __init__(self, req_to_token: torch.Tensor, requests: torch.Tensor, lengths: torch.Tensor) -> None:
        """req_to_token: int32 `[requests, positions]`.

        requests: `[n]`, row of each sequence. lengths: `[n]`, positions including the new ones; 0 = padding, whose
        result is 0.
        """
        require("req_to_token", req_to_token, (torch.int32,), (None, None), req_to_token, strided_rows=True)
        require("requests", requests, INDICES, (None,), req_to_token)
        require("lengths", lengths, INDICES, (requests.shape[0],), req_to_token)
        self.req_to_token = req_to_token
        self.requests = requests
        self.lengths = lengths

    def __len__(self) -> int:
        return self.requests.shape[0]


def attention_decode(
    query: torch.Tensor,
    pool: KvPool,
    sequences: Sequences,
    *,
    scale: float,
    max_length: int,
    window: int | None = None,
    soft_cap: float = 0.0,
    quantized: bool = False,
    is_16_bit: bool = False,
) -> torch.Tensor | Activations:
    """Return attention of query `[n, heads, D]`, each sequence's last position: `[n, heads * D]` or int8 `Activations`.

    max_length: at least the longest length, known on the host; constant in a CUDA graph (the context length).
    window: number of earlier positions that a token sees (SGLang's `sliding_window_size`); None = all.
    soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 = off.
    """
    n, heads, head_dim = query.shape
    _check(query, pool, sequences, n)
    if not query.is_cuda:
        result = _decode_on_cpu(query, pool, sequences, scale, window, soft_cap)
        return quantize(result, is_16_bit=is_16_bit) if quantized else result
    kv_heads = pool.keys.shape[1]
    width = next((width for width in _GROUPS if width >= heads // kv_heads), _GROUPS[-1])
    chunks = -(-(heads // kv_heads) // width)
    splits = most_splits(max_length)
    partial = torch.empty(n * heads * splits, head_dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(n * heads * splits, 2, dtype=torch.float32, device=query.device)
    what = f"query {list(query.shape)}, {kv_heads} KV heads, KV type {pool.kind}, {splits} splits"
    window_argument = _NO_WINDOW if window is None else window
    if n:
        launch(
            f"attention_decode.{pool.kind}.{head_dim}",
            f"attention_decode_{pool.kind}_d{head_dim}_g{width}",
            _THREADS,
            (splits, kv_heads * chunks, n),
            AttentionDecode(
                q=query.data_ptr(),
                keys=pool.keys.data_ptr(),
                values=pool.values.data_ptr(),
                key_scales=address(pool.key_scales),
                value_scales=address(pool.value_scales),
                req_to_token=sequences.req_to_token.data_ptr(),
                requests=sequences.requests.data_ptr(),
                lengths=sequences.lengths.data_ptr(),
                partial=partial.data_ptr(),
                partial_stats=stats.data_ptr(),
                stride=sequences.req_to_token.stride(0),
                heads=heads,
                kv_heads=kv_heads,
                window=window_argument,
                q_is_half=is_half(query),
                requests_are_64_bit=is_long(sequences.requests),
                lengths_are_64_bit=is_long(sequences.lengths),
                scale=scale,
                soft_cap=soft_cap,
            ),
            query,
            what,
        )
    return _combine(query, partial, stats, sequences.lengths, splits, window_argument, quantized, is_16_bit)


def most_splits(max_length: int) -> int:
    """Return the largest number of splits of a sequence with at most max_length positions."""
    counts = [-(-min(max_length, longest) // split) for longest, split in SPLITS.items()]
    return max(1, *counts, -(-max_length // MOST_SPLIT))


def _combine(
    query: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    lengths: torch.Tensor,
    splits: int,
    window: int,
    quantized: bool,
    is_16_bit: bool,
) -> torch.Tensor | Activations:
    n, heads, head_dim = query.shape
    activations = empty_activations((1 + is_16_bit) * n, heads * head_dim, query.device) if quantized else None
    out = None if quantized else query.new_empty(n, heads * head_dim)
    if n:
        launch(
            "attention_combine",
            "attention_combine",
            head_dim,
            (heads, n, 1),
            AttentionCombine(
                partial=partial.data_ptr(),
                partial_stats=stats.data_ptr(),
                lengths=lengths.data_ptr(),
                out=address(out),
                q=address(activations and activations.q),
                scales=address(activations and activations.scales),
                splits=splits,
                window=window,
                out_is_half=is_half(query),
                lengths_are_64_bit=is_long(lengths),
                K=tiles(heads * head_dim) * TILE_COLUMNS,
                is_16_bit=int(is_16_bit),
            ),
            query,
            f"query {list(query.shape)}, {splits} splits",
        )
    return activations if activations is not None else out  # type: ignore[return-value]  # one of the two is set


def _decode_on_cpu(
    query: torch.Tensor, pool: KvPool, sequences: Sequences, scale: float, window: int | None, soft_cap: float
) -> torch.Tensor:
    result = torch.zeros_like(query)
    for i, (request, length) in enumerate(zip(sequences.requests, sequences.lengths, strict=True)):
        if length:
            slots = sequences.req_to_token[request, : int(length)].long()
            keys = read_pool_ref(pool.keys, pool.key_scales, slots)
            values = read_pool_ref(pool.values, pool.value_scales, slots)
            result[i] = attention_ref(query[i : i + 1], keys, values, scale=scale, window=window, soft_cap=soft_cap)[0]
    return result.flatten(1)


def attention_prefill(
    query: torch.Tensor,
    pool: KvPool,
    sequences: Sequences,
    query_starts: torch.Tensor,
    *,
    scale: float,
    max_new: int,
    window: int | None = None,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Return causal attention of query `[tokens, heads, D]`, each sequence's last positions: `[tokens, heads * D]`.

    The pool already holds the new tokens' keys and values. query_starts: int32 `[n + 1]`, the first new token of each
    sequence, then their total number. max_new: at least the most new tokens of one sequence, known on the host. The
    other arguments are those of `attention_decode`.
    """
    tokens, heads, head_dim = query.shape
    _check(query, pool, sequences, None)
    require("query_starts", query_starts, (torch.int32,), (len(sequences) + 1,), query)
    if not query.is_cuda:
        return _prefill_on_cpu(query, pool, sequences, query_starts, scale, window, soft_cap)
    kv_heads = pool.keys.shape[1]
    out = query.new_empty(tokens, heads * head_dim)
    if tokens:
        launch(
            f"attention_prefill.{pool.kind}.{head_dim}",
            f"attention_prefill_{pool.kind}_d{head_dim}",
            _THREADS,
            (-(-max_new // _QUERIES), heads, len(sequences)),
            AttentionPrefill(
                q=query.data_ptr(),
                keys=pool.keys.data_ptr(),
                values=pool.values.data_ptr(),
                key_scales=address(pool.key_scales),
                value_scales=address(pool.value_scales),
                req_to_token=sequences.req_to_token.data_ptr(),
                requests=sequences.requests.data_ptr(),
                lengths=sequences.lengths.data_ptr(),
                query_starts=query_starts.data_ptr(),
                out=out.data_ptr(),
                stride=sequences.req_to_token.stride(0),
                heads=heads,
                kv_heads=kv_heads,
                window=_NO_WINDOW if window is None else window,
                is_half=is_half(query),
                requests_are_64_bit=is_long(sequences.requests),
                lengths_are_64_bit=is_long(sequences.lengths),
                scale=scale,
                soft_cap=soft_cap,
            ),
            query,
            f"query {list(query.shape)}, {kv_heads} KV heads, KV type {pool.kind}, {len(sequences)} sequences",
        )
    return out


def _prefill_on_cpu(
    query: torch.Tensor,
    pool: KvPool,
    sequences: Sequences,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float,
) -> torch.Tensor:
    result = torch.zeros_like(query)
    starts = query_starts.tolist()
    for i, (request, length) in enumerate(zip(sequences.requests, sequences.lengths, strict=True)):
        rows = slice(starts[i], starts[i + 1])
        slots = sequences.req_to_token[request, : int(length)].long()
        keys = read_pool_ref(pool.keys, pool.key_scales, slots)
        values = read_pool_ref(pool.values, pool.value_scales, slots)
        attended = attention_ref(query[rows], keys, values, scale=scale, window=window, soft_cap=soft_cap)
        result[rows] = attended.to(result.dtype)
    return result.flatten(1)


def _check(query: torch.Tensor, pool: KvPool, sequences: Sequences, n: int | None) -> None:
    pool.check()
    kv_heads, head_dim = pool.keys.shape[1:]
    require("query", query, FLOATS, (n, None, head_dim), pool.keys)
    require("requests", sequences.requests, INDICES, (n,), query)
    if query.shape[1] % kv_heads:
        raise OperationError(f"query has {query.shape[1]} heads, must be a multiple of the pool's {kv_heads}")
