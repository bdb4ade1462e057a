"""Sampling operations over the vocabulary."""

from __future__ import annotations

from typing import Final

import torch

from sglang_pascal.kernels.arguments import ArgMax, TopKTopPFilter
from sglang_pascal.ops._call import FLOATS, address, is_half, launch, require
from sglang_pascal.reference import argmax_ref, top_k_top_p_filter_ref

_THREADS: Final = 1024


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest logit of each row, int64 `[n]`: the first of equals; a NaN is the largest."""
    require("logits", logits, FLOATS, (None, None), logits)
    if not logits.is_cuda:
        return argmax_ref(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        arguments = ArgMax(
            logits=logits.data_ptr(),
            out=out.data_ptr(),
            logits_are_half=is_half(logits),
            vocabulary=logits.shape[1],
        )
        grid = (logits.shape[0], 1, 1)
        launch("sampling", "argmax", _THREADS, grid, arguments, logits, f"logits {list(logits.shape)}")
    return out


def top_k_top_p_filter_(
    probabilities: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zero, in place, all outside the top k, the nucleus p, or below min_p times the largest; then scale to sum 1.

    probabilities: float32 `[n, vocabulary]`. top_k: int32 `[n]`; top_p, min_p: float32 `[n]`. All values equal to the
    smallest kept value stay.
    """
    n, vocabulary = probabilities.shape
    require("probabilities", probabilities, (torch.float32,), (None, None), probabilities)
    limits = (("top_k", top_k, torch.int32), ("top_p", top_p, torch.float32), ("min_p", min_p, torch.float32))
    for name, limit, dtype in limits:
        if limit is not None:
            require(name, limit, (dtype,), (n,), probabilities)
    if not probabilities.is_cuda:
        return probabilities.copy_(top_k_top_p_filter_ref(probabilities, top_k, top_p, min_p))
    if n:
        arguments = TopKTopPFilter(
            probabilities=probabilities.data_ptr(),
            top_k=address(top_k),
            top_p=address(top_p),
            min_p=address(min_p),
            vocabulary=vocabulary,
        )
        what = f"probabilities {list(probabilities.shape)}"
        launch("sampling", "top_k_top_p_filter", _THREADS, (n, 1, 1), arguments, probabilities, what)
    return probabilities
