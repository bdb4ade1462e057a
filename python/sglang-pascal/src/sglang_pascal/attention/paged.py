"""Paged attention on plain tensors: what to multiply (the plan) and the multiplication (`attend`).

Keys and values live in a pool `[slots, kv_heads, head_dim]`; a sequence is a list of slots. Work is cut into
rectangles: some sequences x the same number of query rows x the same number of key columns, padded and masked. Decode
is one rectangle with one query row. Prefill cuts each prompt into blocks of query rows. A block reads only the
keys up to its own last row, so a chunk costs (new tokens) x (context). Short prompts share a rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it

if TYPE_CHECKING:
    from collections.abc import Sequence

QUERY_BLOCK: Final = 256
"""Query rows in one rectangle: bounds the mask and, on the causal edge, the share of multiplied but masked scores."""
MAX_PADDING: Final = 1.5
"""Sequences share a rectangle as long as its area is at most this multiple of their own areas together."""


class Span(NamedTuple):
    """A block of consecutive query rows of one sequence and the keys that they may see."""

    sequence: int
    """Index in the batch."""
    first_row: int
    """First row of the block, in the batch's flat list of new tokens."""
    n_rows: int
    first_position: int
    """Position of the first row in the sequence."""
    first_key: int
    """First position that any row of the block sees: 0, or what the sliding window leaves."""

    @property
    def n_keys(self) -> int:
        """Keys that the block's last row sees, from `first_key` on."""
        return self.first_position + self.n_rows - self.first_key


@dataclass(frozen=True)
class Rectangle:
    """Several spans, padded to the same number of rows and keys. `n` spans, `E` rows, `L` keys."""

    rows: torch.Tensor
    """`[n, E]` flat indices of new tokens; padding repeats a row of the span."""
    slots: torch.Tensor
    """`[n, L]` slots of the pool; padding is slot 0."""
    mask: torch.Tensor
    """`[n, 1, E, L]` boolean: which key a row sees. Padding rows see their first key, so that no row is empty."""
    real_rows: torch.Tensor | None
    """Indices into the flattened `[n * E]` that are not padding; None when all are real."""

    @property
    def area(self) -> int:
        """Scores computed per head."""
        return self.mask.numel()


def is_decode(mode: Any) -> bool:
    """Whether a pass of this mode computes tokens of answers: one for each request, or a chain that it verifies."""
    return bool(mode.is_decode() or mode.is_target_verify())


def verified(forward_batch: Any) -> tuple[int, torch.Tensor]:
    """Return SGLang's number of rows per request, and each row's length with itself, `[n * rows]`.

    In a verification, SGLang's lengths do not count the new tokens; their number follows from the shapes.
    """
    lengths: torch.Tensor = forward_batch.seq_lens
    if not forward_batch.forward_mode.is_target_verify():
        return 1, lengths
    width = forward_batch.input_ids.numel() // lengths.numel() if lengths.numel() else 1
    rows = torch.arange(1, width + 1, dtype=lengths.dtype, device=lengths.device)
    return width, (lengths[:, None] + rows).flatten()


def spans_of(prefix_lens: Sequence[int], new_lens: Sequence[int], window: int | None) -> list[Span]:
    """Cut each sequence's new tokens into blocks.

    window: how many positions before its own a row sees; None = all.
    """
    spans, flat = [], 0
    for sequence, (prefix, new) in enumerate(zip(prefix_lens, new_lens, strict=True)):
        for start in range(0, new, QUERY_BLOCK):
            position = prefix + start
            first_key = 0 if window is None else max(0, position - window)
            spans.append(Span(sequence, flat + start, min(QUERY_BLOCK, new - start), position, first_key))
        flat += new
    return spans


def group_spans(spans: Sequence[Span]) -> list[list[Span]]:
    """Put spans of similar size into one rectangle each, largest first."""
    groups: list[list[Span]] = []
    used = 0
    for span in sorted(spans, key=lambda s: (s.n_rows, s.n_keys), reverse=True):
        if groups:
            group = groups[-1]
            rows, keys = max(s.n_rows for s in group), max(*(s.n_keys for s in group), span.n_keys)
            own = used + span.n_rows * span.n_keys
            if rows * keys * (len(group) + 1) <= MAX_PADDING * own:
                group.append(span)
                used = own
                continue
        groups.append([span])
        used = span.n_rows * span.n_keys
    return groups


def plan_prefill(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: Sequence[int],
    new_lens: Sequence[int],
    window: int | None,
) -> list[Rectangle]:
    """The rectangles of a prefill. Lengths are on the host: nothing waits for the device.

    req_to_token: `[requests, positions]`, the slot of each position of each request.
    """
    device = req_to_token.device
    rectangles = []
    for group in group_spans(spans_of(prefix_lens, new_lens, window)):
        rows = torch.arange(max(s.n_rows for s in group), device=device)
        keys = torch.arange(max(s.n_keys for s in group), device=device)
        n_rows, first_row, position, first_key, n_keys, sequence = (
            torch.tensor(column, device=device)
            for column in zip(
                *((s.n_rows, s.first_row, s.first_position, s.first_key, s.n_keys, s.sequence) for s in group),
                strict=True,
            )
        )
        row = torch.minimum(rows, n_rows[:, None] - 1)
        real = rows < n_rows[:, None]
        key_position = first_key[:, None] + keys
        within = keys < n_keys[:, None]
        slots = req_to_token[req_pool_indices[sequence][:, None], torch.where(within, key_position, 0)]
        mask = _visible((position[:, None] + row)[:, :, None], key_position[:, None, :], window)
        all_real = all(s.n_rows == group[0].n_rows for s in group)
        rectangles.append(
            Rectangle(
                rows=first_row[:, None] + row,
                slots=torch.where(within, slots, 0).long(),
                mask=mask[:, None],
                real_rows=None if all_real else real.flatten().nonzero().flatten(),
            )
        )
    return rectangles


def plan_decode(slots: torch.Tensor, lengths: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and mask of a decode step over `[n, L]` slots: recordable in a CUDA graph, no wait, no shape from data.

    lengths: `[n * E]`, of each row with its new token; E rows of a request follow one another. A length of 0 (padding
    of a graph) sees key 0. The mask is `[n, 1, E, L]`.
    """
    position = (lengths.clamp(min=1) - 1).view(len(slots), -1)
    keys = torch.arange(slots.shape[1], device=slots.device)
    mask = _visible(position[:, :, None], keys, window)
    return torch.where(mask.any(1), slots, 0).long(), mask[:, None]


def _visible(position: torch.Tensor, key_position: torch.Tensor, window: int | None) -> torch.Tensor:
    mask = key_position <= position
    return mask if window is None else mask & (key_position >= position - window)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    scaling: float,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Masked attention with grouped heads, without repeating keys or values.

    query `[n, E, heads, D]`, keys `[n, L, kv_heads, D]`, values `[n, L, kv_heads, Dv]`, mask `[n, 1, E, L]`; the result
    is `[n, E, heads, Dv]`.
    The query heads that share a key head become further rows of it.
    soft_cap: scores become soft_cap x tanh(score / soft_cap); 0 = off.
    """
    n, n_rows, n_heads, _ = query.shape
    kv_heads = keys.shape[2]
    group = n_heads // kv_heads
    rows = query.view(n, n_rows, kv_heads, group, -1).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, group * n_rows, -1)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if group > 1 and n_rows > 1:
        mask = mask.expand(n, group, n_rows, -1).reshape(n, 1, group * n_rows, -1)
    if soft_cap:
        result = _attend_capped(rows, keys, values, mask, scaling, soft_cap)
    else:
        result = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return result.view(n, kv_heads, group, n_rows, -1).permute(0, 3, 1, 2, 4).reshape(n, n_rows, n_heads, -1)


def _attend_capped(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float, soft_cap: float
) -> torch.Tensor:
    scores = (rows @ keys.transpose(-1, -2)).float() * (scaling / soft_cap)
    scores = scores.tanh_().mul_(soft_cap).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).to(values.dtype) @ values


def gather(
    pool: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """`[n, L]` slots of a pool `[slots, heads, D]` -> `[n, L, heads, D]` in `dtype` (narrower types are widened here).

    scales: `[slots, heads]` of an int8 pool.
    """
    if pool.is_floating_point() and pool.element_size() == 1:  # torch cannot index fp8, but its bytes
        return _take(pool.view(torch.uint8), slots).view(pool.dtype).to(dtype)
    values = _take(pool, slots).to(dtype)
    return values if scales is None else values * _take(scales, slots).to(dtype)[..., None]


def _take(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:])
