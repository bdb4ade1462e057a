"""Drafts of a smaller model in the same process: it continues each text by its likeliest tokens, one after the other.

It shares the target's slots: the keys and values of a token are at the same place in both models' pools. After a step
without drafts or a cached prompt, some of its keys and values are missing; it computes them before it drafts again.
Missing or stale ones never change an answer: the target verifies every token.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_schedule

from sglang_pascal.errors import PluginError
from sglang_pascal.speculation.graphs import RecordedWidths
from sglang_pascal.speculation.passes import run_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sglang_pascal.speculation.drafting import Step
    from sglang_pascal.speculation.texts import Text

FIRST_ROWS: Final = 2
"""Rows of a request in the first pass: the newest token, and the one before it, whose keys and values are missing if
all drafts of the last step were right. Two rows take the time of one."""
MOST_BEHIND: Final = 2048
"""Most missing tokens that are computed for a draft. If a request lacks more, its drafts are seldom right, and soon it
gets few."""


class Span(NamedTuple):
    """Positions of a request."""

    row: int
    """Of the request in the batch."""
    first: int
    end: int


class DraftModel:
    """SGLang's worker of the draft model, and a record of the slots whose keys and values it has computed."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, most_rows: int) -> None:
        """Load the weights. Raises PluginError if the vocabularies differ in size."""
        target = target_worker.model_runner
        self._worker = TpModelWorker(
            server_args=server_args,
            gpu_id=gpu_id,
            nccl_port=nccl_port,
            is_draft_worker=True,
            context_length=target.model_config.context_len,
            random_seed=target_worker.random_seed,
        )
        self._runner = self._worker.model_runner
        _require_same_size(target.model_config.vocab_size, self._runner.model_config.vocab_size)
        self._graphs = RecordedWidths(self._runner, [1, FIRST_ROWS], most_rows)
        self._is_computed = torch.zeros(0, dtype=torch.bool)
        chunk = get_schedule().chunked_prefill_size
        self._chunk = chunk if chunk and chunk > 0 else MOST_BEHIND
        self.cost = _n_bytes(self._runner.model) / _n_bytes(target.model)
        """Time of drafting a token, as a share of the target's step: what both read."""

    def alloc_memory_pool(self, **pools: Any) -> None:
        """Use the target's slots, which SGLang passes, and allocate memory for their keys and values."""
        self._worker.alloc_memory_pool(**pools)
        pool = self._runner.token_to_kv_pool
        self._is_computed = torch.zeros(pool.size + pool.page_size, dtype=torch.bool, device=self._runner.device)

    def init_attention_backends(self) -> None:
        """As SGLang's worker does."""
        self._worker.init_attention_backends()

    def record(self) -> None:
        """Record its two kinds of passes."""
        self._worker.init_cuda_graphs()
        self._graphs.record()

    def prefilled(self, batch: Any) -> None:
        """Compute the prompts that the target computes in this step."""
        own = _own(batch)
        self._worker.forward_batch_generation(own, is_verify=True)
        self._note(batch.out_cache_loc, is_computed=True)

    def forget(self, slots: torch.Tensor) -> None:
        """Note that the target writes other tokens to these slots `[m]`."""
        self._note(slots, is_computed=False)

    def _note(self, slots: torch.Tensor, *, is_computed: bool) -> None:
        # An assignment would copy the value to the device, and wait for it.
        self._is_computed.index_fill_(0, slots.long(), is_computed)

    def propose(self, batch: Any, step: Step) -> torch.Tensor:
        """Return the likeliest tokens after each text, `[n, width - 1]` int64. The host must know the newest tokens."""
        n_drafts = step.width - 1
        newest = torch.tensor([list(text.index.tokens[-FIRST_ROWS:]) for text in step.texts])
        tokens = newest.to(batch.seq_lens.device, non_blocking=True)
        lengths = batch.seq_lens - (FIRST_ROWS - 1)
        drafts = []
        for _ in range(n_drafts):
            positions = lengths[:, None] + torch.arange(tokens.shape[1], device=lengths.device)
            own = _own(batch)
            own.seq_lens = lengths
            output, _ = run_chain(self._worker, self._graphs, own, tokens, positions)
            logits = output.next_token_logits.view(*tokens.shape, -1)[:, -1]
            lengths, tokens = positions[:, -1] + 1, logits.argmax(-1)[:, None]
            drafts.append(tokens)
        columns = batch.seq_lens[:, None] + torch.arange(n_drafts, device=lengths.device)
        self._note(_slots(batch, columns).flatten(), is_computed=True)
        return torch.cat(drafts, 1)

    def behind(self, batch: Any, longest: int) -> list[int]:
        """Return each request's number of tokens from the first that is not computed to the one before the newest.

        longest: length of the longest request, tokens. This waits for the device.
        """
        lengths = batch.seq_lens
        columns = torch.arange(longest, device=lengths.device)
        missing = ~self._is_computed[_slots(batch, columns[None])] & (columns < lengths[:, None])
        first = torch.where(missing.any(1), missing.int().argmax(1), lengths)
        found: list[int] = (lengths - first).tolist()
        return found

    def catch_up(self, batch: Any, texts: Sequence[Text]) -> bool:
        """Compute what is missing of the texts, unless a pass of a draft does; return whether there was something.

        Passes have at most a chunk of tokens, of all requests together: each takes the host longer than the device.
        """
        behind = self.behind(batch, max(len(text.index) for text in texts))
        missing = [
            Span(row, len(text.index) - 1 - n, len(text.index) - 1)
            for row, (text, n) in enumerate(zip(texts, behind, strict=True))
            if FIRST_ROWS <= n <= MOST_BEHIND
        ]
        for spans in chunks(missing, self._chunk):
            self._extend(batch, spans, [texts[each.row].index.tokens[each.first : each.end] for each in spans])
        return bool(missing)

    def _extend(self, batch: Any, spans: Sequence[Span], tokens: Sequence[Sequence[int]]) -> None:
        """Compute tokens of some requests in one pass."""
        own, device = _own(batch), batch.seq_lens.device
        rows, firsts, ends = zip(*spans, strict=True)
        own.forward_mode, own.reqs = ForwardMode.EXTEND, [batch.reqs[row] for row in rows]
        own.req_pool_indices = batch.req_pool_indices[torch.tensor(rows, device=device)]
        own.input_ids = torch.tensor([token for each in tokens for token in each], device=device)
        own.seq_lens, own.seq_lens_cpu = torch.tensor(ends, device=device), torch.tensor(ends)
        own.seq_lens_sum = sum(ends)
        own.orig_seq_lens = own.seq_lens.int()
        own.prefix_lens, own.extend_lens = list(firsts), [len(each) for each in tokens]
        own.extend_num_tokens = sum(own.extend_lens)
        own.extend_logprob_start_lens = own.extend_lens
        owners = own.req_pool_indices.repeat_interleave(torch.tensor(own.extend_lens, device=device))
        positions = torch.tensor([place for each in spans for place in range(each.first, each.end)], device=device)
        own.out_cache_loc = batch.req_to_token_pool.req_to_token[owners, positions].long()
        self._worker.forward_batch_generation(own, is_verify=True)
        self._note(own.out_cache_loc, is_computed=True)


def chunks(missing: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """Divide spans into passes of at most `most` tokens each, in order."""
    spans, left = [], most
    for span in missing:
        first = span.first
        while first < span.end:
            end = min(span.end, first + left)
            spans.append(Span(span.row, first, end))
            first, left = end, left - (end - first)
            if not left:
                yield spans
                spans, left = [], most
    if spans:
        yield spans


def _own(batch: Any) -> Any:
    """Return a copy of SGLang's batch for the draft model, which reports nothing about its passes."""
    own = copy.copy(batch)
    own.return_logprob, own.spec_info, own.has_grammar = False, None, False
    own.extend_input_logprob_token_ids = None
    return own


def _slots(batch: Any, columns: torch.Tensor) -> torch.Tensor:
    """Return the slots `[n, m]` int64 at positions `[n, m]` of each request."""
    slots: torch.Tensor = batch.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], columns]
    return slots.long()


def _n_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))


def _require_same_size(target: int, draft: int) -> None:
    if target != draft:
        raise PluginError(
            f"--speculative-draft-model-path: the draft model has a vocabulary of {draft} tokens, but the model has "
            f"{target}; choose a smaller model of the same family"
        )
