"""`seed` of a request: the same seed gives the same text, whatever other requests run.

SGLang reads seeds only with --enable-deterministic-inference, which allows only attention backends without Pascal
code. But its sampler can always draw by seed and position. Here a batch gets the seeds of its requests as soon as one
request has a seed; the other requests in such a batch draw with random seeds.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_SEED_BITS: Final = 62
"""Bits of a random seed: below the sign bit of int64."""
_GOLDEN: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2: Final = 0x94D049BB133111EB - (1 << 64)
"""SplitMix64's constants, as int64."""


def seeds_of_requests(original: Callable[..., Any], info_class: type, batch: Any, vocab_size: int) -> Any:
    """Wrap `SamplingBatchInfo.from_schedule_batch`: set seeds `[n]`, int64, if a request of the batch has one."""
    info = original(info_class, batch, vocab_size)
    chosen = [request.sampling_params.sampling_seed for request in batch.reqs]
    if info.sampling_seed is None and any(seed is not None for seed in chosen):
        info.sampling_seed = _tensor([_own() if seed is None else seed for seed in chosen], info)
    return info


def merge_seeds(original: Callable[..., Any], info: Any, other: Any) -> Any:
    """Wrap `SamplingBatchInfo.merge_batch`, which drops the seeds if one side has none."""
    if (info.sampling_seed is None) != (other.sampling_seed is None):
        for side in (info, other):
            if side.sampling_seed is None:
                side.sampling_seed = _tensor([_own() for _ in range(len(side))], side)
    return original(info, other)


def without_min_p(probs: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Return probabilities `[n, vocabulary]` with zeros where they are below min_ps `[n]` times the row's largest.

    SGLang's sampler refuses min-p together with seeds. min-p removes the tokens that come last in the order in which
    top-k and top-p choose, so it can be applied before them.
    """
    return probs.masked_fill(probs < probs.amax(dim=-1, keepdim=True) * min_ps.view(-1, 1), 0.0)


def draw_with_seeds(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace SGLang's `multinomial_with_seed`, whose hash is a kernel of sgl_kernel.

    logprobs: `[n, columns]`; -inf is never drawn. seeds, positions: `[n]`, integers. Returns `[n, 1]`, int64, the same
    for the same row, seed and position. Gumbel's trick: the largest logprob - log(-log(u)), u uniform, is a draw.
    """
    uniform = _uniform(seeds, positions, logprobs.shape[1])
    return (logprobs.double() - (-uniform.log()).log()).argmax(dim=1, keepdim=True)


def draw_filtered_with_seeds(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return token ids `[n]`, int32, drawn by seed from the top k of the nucleus p of probs `[n, vocabulary]`.

    SGLang draws among the sorted probabilities, so that a token's random number depends on its rank, and a request's
    text on whether another request of its batch has a filter. Here the number depends on the token. Of equal
    probabilities, the first tokens are in the top k.
    """
    import torch

    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    before = ordered.cumsum(-1) - ordered
    is_out = (ranks >= top_ks.view(-1, 1)) | ((before > top_ps.view(-1, 1)) & (top_ps.view(-1, 1) < 1))
    kept = ordered.log().masked_fill(is_out, -torch.inf)
    return draw_with_seeds(torch.empty_like(kept).scatter_(1, tokens, kept), seeds, positions).view(-1).int()


def _uniform(seeds: torch.Tensor, positions: torch.Tensor, columns: int) -> torch.Tensor:
    """Return float64 `[n, columns]` in (0, 1), by SplitMix64's mixing of seed, position and column.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014); constants of its reference code. int64
    wraps as uint64 does; a shift to the right must clear the sign bits.
    """
    import torch

    rows = _mixed(_mixed(seeds.long()) + positions.long() * _GOLDEN)
    values = _mixed(rows.view(-1, 1) + torch.arange(columns, device=seeds.device) * _GOLDEN)
    return ((values >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53


def _mixed(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ (values >> 30 & (1 << 34) - 1)) * _MIX_1
    values = (values ^ (values >> 27 & (1 << 37) - 1)) * _MIX_2
    return values ^ (values >> 31 & (1 << 33) - 1)


def _own() -> int:
    return secrets.randbits(_SEED_BITS)


def _tensor(seeds: list[int], info: Any) -> torch.Tensor:
    import torch

    return torch.tensor(seeds, dtype=torch.int64, device=info.device)
