"""The worker that SGLang's scheduler calls for each step: draft by lookup, verify a chain, accept what is right."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput

from sglang_pascal.kernels.formats import SPECULATIVE_WIDTHS
from sglang_pascal.speculation.counters import Counters
from sglang_pascal.speculation.drafting import Drafter
from sglang_pascal.speculation.graphs import RecordedWidths
from sglang_pascal.speculation.load import most_rows, row_cost
from sglang_pascal.speculation.verification import accepted, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class LookupWorker(BaseSpecWorker):  # type: ignore[misc]  # SGLang publishes no types
    """Prompt lookup. It has no draft model, so SGLang's pools and weights are the target's alone."""

    draft_worker = None

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        """SGLang calls it with these names, before any pool exists."""
        del server_args, gpu_id, nccl_port
        super().__init__()
        self._target_worker = target_worker
        self._runner = target_worker.model_runner
        self.speculative_num_draft_tokens: int = get_spec().speculative_num_draft_tokens
        self.speculative_num_steps = self.speculative_num_draft_tokens - 1
        self._device = torch.device(self._runner.device)
        widest, rows = self.speculative_num_draft_tokens, most_rows(self._device.type)
        widths = [*(width for width in SPECULATIVE_WIDTHS if width < widest), widest]
        self._graphs = RecordedWidths(self._runner, widths, rows)
        self._drafter = Drafter(
            widths=self._graphs.widths,
            most_rows=rows,
            row_cost=row_cost(self._device.type),
            context_length=self._runner.model_config.context_len,
        )
        self._counters = Counters()
        self._is_one_each = True
        """Whether every request got one token in the step before; a prompt's step gives one too."""

    def init_cuda_graphs(self) -> None:
        """Record the steps of each width, after SGLang has recorded those of width 1."""
        self._graphs.record()

    def clear_cache_pool(self) -> None:
        """Forget the running requests."""
        self._drafter.clear()

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """Count what was right; SGLang calls it when a step's result is on the host."""
        del batch_size
        self._counters.right(num_correct_drafts_per_req, self._drafter.won_seconds)

    def forward_batch_generation(
        self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None = None, pp_proxy_tensors: Any = None
    ) -> Any:
        """Run one step. on_publish: takes each request's new length `[n]`, if SGLang overlaps steps."""
        del pp_proxy_tensors
        with torch.no_grad():
            return (self._decode if batch.forward_mode.is_decode() else self._prefill)(batch, on_publish)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prefill(self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None) -> Any:
        """Compute the target's own step; its token is a run of length 1."""
        result = self.target_worker.forward_batch_generation(batch)
        self._drafter.prefilled(batch.reqs)
        lengths = batch.seq_lens.clone()
        if on_publish is not None:
            on_publish(lengths)
        result.accept_lens = torch.ones(len(batch.reqs), dtype=torch.int32, device=self._device)
        result.new_seq_lens = lengths
        result.next_draft_input = self._carried(result.next_token_ids.view(-1, 1), result.accept_lens, lengths)
        result.speculative_num_draft_tokens = self.speculative_num_draft_tokens
        return result

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _decode(self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None) -> Any:
        step = self._drafter.plan(batch.reqs, functools.partial(self._newest_runs, batch))
        width = step.width
        self._counters.step(batch.reqs, width, step.n_drafts)
        tokens = _newest(batch.spec_info, self._is_one_each)[:, None]
        positions = batch.seq_lens[:, None]
        if width > 1:
            tokens = torch.cat((tokens, self._on_device(step.drafts)), 1)
            positions = positions + torch.arange(width, device=self._device)
        self._is_one_each = width == 1
        output, recorded = self._verify(batch, tokens, positions)
        drawn = draw(self._runner.sampler, batch, output, tokens, positions.flatten())
        if width > 1:
            lens = accepted(tokens, drawn, self._on_device(step.n_drafts))
        else:
            lens = torch.ones(len(drawn), dtype=torch.int32, device=self._device)
        lengths = batch.seq_lens + lens
        if on_publish is not None:
            on_publish(lengths)
        reported = drawn.int()
        return GenerationBatchResult(
            logits_output=output,
            next_token_ids=reported.flatten(),
            can_run_cuda_graph=recorded,
            accept_lens=lens,
            new_seq_lens=lengths,
            next_draft_input=self._carried(reported, lens, lengths),
            speculative_num_draft_tokens=width,
        )

    def _verify(self, batch: Any, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[Any, bool]:
        """Run the model over tokens `[n, width]`; the batch's fields are restored by SGLang."""
        width = tokens.shape[1]
        slots = batch.req_to_token_pool.req_to_token[batch.req_pool_indices[:, None], positions]
        batch.input_ids, batch.out_cache_loc = tokens.flatten(), slots.flatten().long()
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.spec_info = NgramVerifyInput(
            draft_token=batch.input_ids,
            positions=positions.flatten(),
            draft_token_num=width,
            new_seq_lens=batch.seq_lens,
        )
        batch.spec_info.capture_hidden_mode = CaptureHiddenMode.NULL
        with self._graphs.of_width(width):
            result = self.target_worker.forward_batch_generation(batch, is_verify=True)
        batch.forward_mode = ForwardMode.DECODE
        return result.logits_output, result.can_run_cuda_graph

    def _carried(self, runs: torch.Tensor, lens: torch.Tensor, lengths: torch.Tensor) -> NgramVerifyInput:
        """Return what the next step gets: runs `[n, width]`, padded to the one width that SGLang carries."""
        padding = self.speculative_num_draft_tokens - runs.shape[1]
        return NgramVerifyInput(
            draft_token_num=self.speculative_num_draft_tokens,
            new_seq_lens=lengths,
            accept_tokens=torch.nn.functional.pad(runs.int(), (0, padding)).flatten(),
            accept_lens=lens,
        )

    def _on_device(self, values: Sequence[Any]) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(self._device, non_blocking=True)

    def _newest_runs(self, batch: Any) -> list[tuple[int, list[int]]]:
        """Return each request's length and its tokens of the last step; this waits for the device."""
        lens = batch.spec_info.accept_lens[:, None]
        runs = batch.spec_info.accept_tokens.view(len(lens), -1)
        facts = torch.cat((batch.seq_lens[:, None], lens, runs), 1).tolist()
        return [(length + 1, run[:n]) for length, n, *run in facts]


def _newest(carried: Any, is_one_each: bool) -> torch.Tensor:
    """Return the last token of each request's run, `[n]` int64."""
    lens = carried.accept_lens
    runs = carried.accept_tokens.view(len(lens), -1)
    last: torch.Tensor = runs[:, 0] if is_one_each else runs.gather(1, lens[:, None].long() - 1)[:, 0]
    return last.long()
