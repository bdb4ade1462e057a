"""Plain torch in place of Triton kernels that SGLang launches on any CUDA tensor, though the platform has no Triton.

Triton's compiler needs compute capability 7.0 or newer, and builds its launchers with a C compiler that servers may
not have. Each function has the arguments and the result of SGLang's own; `compat` puts it in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from sglang_pascal.sampling_seed import draw_filtered_with_seeds, without_min_p

if TYPE_CHECKING:
    from collections.abc import Callable

_BITS: Final = 32
"""Tokens in one word of a grammar's mask."""


def try_small_copy(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> bool:
    """Never copy in one launch: SGLang then copies the inputs of a recorded step by `torch._foreach_copy_`."""
    del dsts, srcs
    return False


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, indices: Any = None) -> None:
    """Set logits `[n, vocabulary]` of tokens that a grammar forbids to -inf, in place.

    bitmask: int32 `[n, words]`, one bit per token, 1 = allowed; logits beyond its end stay. indices: rows to change;
    None = all.
    """
    logits, bitmask = logits.view(-1, logits.shape[-1]), bitmask.view(-1, bitmask.shape[-1])
    rows = torch.arange(len(logits), device=logits.device) if indices is None else torch.as_tensor(indices)
    rows = rows.to(logits.device)
    vocabulary = min(logits.shape[1], bitmask.shape[1] * _BITS)
    shifts = torch.arange(_BITS, dtype=torch.int32, device=bitmask.device)
    allowed = (bitmask[rows, :, None] >> shifts & 1).flatten(1)[:, :vocabulary].bool()
    logits[rows, :vocabulary] = logits[rows, :vocabulary].masked_fill(~allowed, -torch.inf)


def free_swa_pages(self: Any, full_page_representatives: torch.Tensor) -> torch.Tensor:
    """`SWATokenToKVPoolAllocator`'s method, as SGLang does it on any other device."""
    pages: torch.Tensor = self._free_swa_pages_none_cuda(full_page_representatives)
    return pages


def write_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write the slots of new positions, start to end of each request, into the table `[requests, positions]`.

    out_cache_loc: the slots, one request after the other. req_pool_indices, start_offset, end_offset: `[batch_size]`.
    """
    total, slots = len(out_cache_loc), out_cache_loc.to(req_to_token.dtype)
    if batch_size == 1:  # 4 launches instead of 20 in each step of an answer
        req_to_token[req_pool_indices, start_offset + torch.arange(total, device=slots.device)] = slots
        return
    lengths = (end_offset - start_offset).long()
    rows, first, start = (
        torch.repeat_interleave(values.long(), lengths, output_size=total)
        for values in (req_pool_indices, lengths.cumsum(0) - lengths, start_offset)
    )
    req_to_token[rows, torch.arange(total, device=slots.device) - first + start] = slots


def row_logsumexp(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return per row of x `[n, columns]`, float32: the largest value, and logsumexp minus it."""
    if not x.shape[1]:
        return x.new_full((len(x),), -torch.inf, dtype=torch.float32), x.new_zeros(len(x), dtype=torch.float32)
    values = x.float()
    largest = values.amax(-1)
    rest = torch.logsumexp(values - largest[:, None], dim=-1)
    return largest, torch.where(largest.isinf(), 0.0, rest)


def row_logsumexp_topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `row_logsumexp`, and the k largest values as float32 and their columns, largest first."""
    values, columns = x.float().topk(k, dim=-1)
    return *row_logsumexp(x), values, columns


def sample_from_probs(
    original: Callable[..., Any],
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    return_filtered_probs: bool = False,
    max_top_k: int | None = None,
) -> Any:
    """Wrap `top_k_top_p_min_p_sampling_from_probs_torch`: draw by seed and token, also with min-p; and if SGLang would
    sort the vocabulary on a GPU, let our kernel find the smallest value that stays.

    SGLang's own code runs if the order is needed (the filtered values), or if every request has a small top k: then it
    only looks for the k largest. A greedy request (top k of 1) gets the token that it gets in a batch of greedy ones.
    """
    if sampling_seed is not None and need_min_p_sampling:
        probs, need_min_p_sampling = without_min_p(probs, min_ps), False
    if sampling_seed is not None and positions is not None and not return_filtered_probs:
        return draw_filtered_with_seeds(probs, top_ks, top_ps, sampling_seed, positions)
    sorts = max_top_k is None or max_top_k >= probs.shape[-1]
    plain = sampling_seed is None and not return_filtered_probs and probs.dtype == torch.float32
    if sorts and plain and probs.is_cuda:
        drawn = draw_filtered(probs, top_ks, top_ps, min_ps if need_min_p_sampling else None)
    else:
        drawn = original(
            *(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions),
            return_filtered_probs=return_filtered_probs,
            max_top_k=max_top_k,
        )
    return drawn if return_filtered_probs else torch.where(top_ks == 1, probs.argmax(-1).int(), drawn)


def draw_filtered(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None
) -> torch.Tensor:
    """Return token ids `[n]`, int32, drawn from what the filters leave of float32 `probs` `[n, vocabulary]`."""
    from sglang_pascal.ops.sampling import top_k_top_p_filter_

    kept = top_k_top_p_filter_(
        probs.clone(), top_ks.int(), top_ps.float(), min_ps.float() if min_ps is not None else None
    )
    return torch.multinomial(kept, num_samples=1).view(-1).to(torch.int32)
