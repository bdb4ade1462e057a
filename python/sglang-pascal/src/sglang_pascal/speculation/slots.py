"""Slots of the KV cache for the next steps of a batch, reserved for several steps at once.

Before each step, SGLang reserves slots for two steps of the widest kind, and writes their numbers to its table by some
twenty launches, although a step without drafts needs only one more. Here as many are reserved, but only if the slots
might not suffice for the next step and the one whose result is not known. The host knows the places, and writes them
by one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Growth(NamedTuple):
    """Positions of a request that get slots."""

    row: int
    """The request's index in the batch."""
    first: int
    end: int


def growths(spans: Sequence[tuple[int, int]], *, width: int, in_flight: int) -> list[Growth]:
    """Return the positions that need slots now.

    spans: for each request (tokens known on the host, positions with slots). width: most rows of the next step.
    in_flight: rows of the step whose result is not known; a request may have as many tokens more than the host knows.
    """
    return [
        Growth(row, allocated, committed + 2 * width)
        for row, (committed, allocated) in enumerate(spans)
        if allocated < committed + in_flight + width
    ]


def prepare_for_decode(original: Callable[[Any], None], batch: Any) -> None:
    """Wrap SGLang's `eagle_prepare_for_decode`, which runs before each step with speculation."""
    from sglang.srt.mem_cache.allocation import alloc_token_slots
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_len_per_decode

    if batch.token_to_kv_pool_allocator.page_size > 1 or not batch.enable_overlap:
        original(batch)
        return
    batch.maybe_evict_swa()
    if batch.sampling_info.penalizer_orchestrator.is_required:
        batch.cumulate_penalty_output_tokens()
    width = get_alloc_len_per_decode()
    found = growths(
        [(each.kv.kv_committed_len, each.kv.kv_allocated_len) for each in batch.reqs],
        width=width,
        in_flight=getattr(batch.spec_info, "in_flight", width),
    )
    for request in batch.reqs:
        request.decode_batch_idx += 1
    if found:
        slots = alloc_token_slots(batch.tree_cache, sum(each.end - each.first for each in found))
        _write(batch, found, slots)
    if batch.seq_lens_cpu is None:
        batch.max_seq_len_host = max((each.kv.kv_allocated_len for each in batch.reqs), default=0)


def _write(batch: Any, found: Sequence[Growth], slots: torch.Tensor) -> None:
    table, requests = batch.req_to_token_pool.req_to_token, batch.req_pool_indices
    rows = [each.row for each in found for _ in range(each.first, each.end)]
    columns = [column for each in found for column in range(each.first, each.end)]
    places = torch.tensor([rows, columns], pin_memory=table.device.type == "cuda").to(table.device, non_blocking=True)
    table[requests[places[0]], places[1]] = slots.to(table.dtype)
    for each in found:
        batch.reqs[each.row].kv.kv_allocated_len = each.end
