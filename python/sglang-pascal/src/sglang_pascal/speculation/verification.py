"""Turns the logits of a checked chain into accepted tokens, exactly as if each token had been decoded alone.

Row j of a request sees its text and the first j drafts. A token is drawn from every row's own distribution. A
draft is accepted if all drafts before it were accepted and it equals the token that the row before it drew. The host's
drafts are fixed tokens, not samples, so the accepted tokens have the distribution of decoding without drafts, for any
sampling parameters and any seed.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch

_PER_REQUEST: Final = ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")
"""Tensors `[n, ...]` of SGLang's sampling parameters."""


def draw(sampler: Any, batch: Any, output: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw a token from every row; return them as `[n, width]`, and fill in the requested log-probabilities.

    sampler: SGLang's. output: has the logits `[n * width, vocabulary]`, which are changed. tokens: `[n, width]`, the
    checked chain. positions: `[n * width]`, the positions of its tokens.
    """
    from sglang.srt.layers.logprob_processor import compute_spec_logprobs

    n, width = tokens.shape
    _constrain(batch, output.next_token_logits.view(n, width, -1), tokens)
    logits = output.next_token_logits
    keeps = batch.return_logprob and not batch.sampling_info.is_all_greedy  # the sampler overwrites its logits
    kept = logits.clone() if keeps else logits
    drawn: torch.Tensor = sampler(output, rows_of(batch.sampling_info, width), False, [], [], positions)
    output.next_token_logits = kept
    if batch.return_logprob:
        compute_spec_logprobs(batch, output, drawn.long(), chain_stride=width)
    return drawn.view(n, width)


def accepted(tokens: torch.Tensor, drawn: torch.Tensor, n_drafts: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens that each request gets, int32 `[n]`: its right drafts, and the token after them.

    tokens, drawn: `[n, width]`. n_drafts: `[n]`; columns beyond them are padding.
    """
    columns = torch.arange(tokens.shape[1] - 1, device=tokens.device)
    right = (tokens[:, 1:] == drawn[:, :-1]) & (columns < n_drafts[:, None])
    return (right.int().cumprod(1).sum(1) + 1).int()


def rows_of(info: Any, width: int) -> Any:
    """Return SGLang's sampling parameters, each request's repeated `width` times, without the constraints of logits."""
    rows = copy.copy(info)
    for name in _PER_REQUEST:
        value = getattr(info, name)
        if width > 1 and value is not None:
            setattr(rows, name, value.repeat_interleave(width, 0))
    rows.grammar_mask = rows.logit_bias = rows.acc_additive_penalties = rows.acc_scaling_penalties = None
    return rows


def _constrain(batch: Any, logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Apply penalties, grammars and biases to logits `[n, width, vocabulary]`, in SGLang's order.

    Penalties are those at the start of the step. They are right for row 0; a request with penalties has no drafts.
    """
    info = batch.sampling_info
    if info.acc_additive_penalties is not None:
        logits.add_(info.acc_additive_penalties[:, None])
    if info.acc_scaling_penalties is not None:
        scale = info.acc_scaling_penalties[:, None]
        logits.copy_(torch.where(logits < 0, logits * scale, logits / scale))
    if batch.has_grammar:
        from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

        tree = GrammarTree.from_linear_chain(tokens)
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs, tree=tree, sampling_info=info, device=logits.device, barrier=None
        )
        if mask is not None:
            mask.apply(logits.view(-1, logits.shape[-1]))
    if info.logit_bias is not None:
        logits.add_(info.logit_bias[:, None])
