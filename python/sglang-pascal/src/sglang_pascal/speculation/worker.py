"""The workers that SGLang's scheduler calls for each step: draft, verify a chain, accept what is right."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.speculative.ngram_info import NgramVerifyInput

from sglang_pascal.compat import reserve_slots_for_several_steps
from sglang_pascal.kernels.formats import SPECULATIVE_WIDTHS
from sglang_pascal.speculation.counters import Counters
from sglang_pascal.speculation.draft_model import DraftModel
from sglang_pascal.speculation.drafting import Drafter
from sglang_pascal.speculation.graphs import RecordedWidths
from sglang_pascal.speculation.load import most_rows, row_cost
from sglang_pascal.speculation.passes import run_chain
from sglang_pascal.speculation.texts import Text
from sglang_pascal.speculation.verification import accepted, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sglang_pascal.speculation.drafting import Step


class ChainWorker(BaseSpecWorker):  # type: ignore[misc]  # SGLang publishes no types
    """The part that does not depend on the source of drafts."""

    draft_worker = None
    """SGLang's name for a worker whose weights and pools it manages; a draft model's are managed here."""
    search = staticmethod(Text.draft)
    """See `Drafter`."""
    draft_cost = 0.0
    """See `Pace`."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        """SGLang calls it with these names, before any pool exists."""
        del server_args, gpu_id, nccl_port
        super().__init__()
        self._target_worker = target_worker
        self._runner = target_worker.model_runner
        self.speculative_num_draft_tokens: int = get_spec().speculative_num_draft_tokens
        self.speculative_num_steps = self.speculative_num_draft_tokens - 1
        self._device = torch.device(self._runner.device)
        self._most_rows = most_rows(self._device.type)
        widest = self.speculative_num_draft_tokens
        widths = [*(width for width in SPECULATIVE_WIDTHS if width < widest), widest]
        self._graphs = RecordedWidths(self._runner, widths, self._most_rows)
        self._drafter = self._new_drafter()
        self._counters = Counters()
        self._checked: set[str] = set()
        """Requests whose last step had drafts: it may have given several tokens."""
        self._ones: dict[tuple[int, bool], torch.Tensor] = {}
        reserve_slots_for_several_steps()

    def _new_drafter(self) -> Drafter:
        return Drafter(
            widths=self._graphs.widths,
            most_rows=self._most_rows,
            row_cost=row_cost(self._device.type),
            draft_cost=self.draft_cost,
            search=self.search,
            context_length=self._runner.model_config.context_len,
        )

    def init_cuda_graphs(self) -> None:
        """Record the steps of each width, after SGLang has recorded those of width 1."""
        self._graphs.record()

    def clear_cache_pool(self) -> None:
        """Forget the running requests."""
        self._drafter.clear()

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """Count the drafts that were right; SGLang calls it when a step's result is on the host."""
        del batch_size
        self._counters.right(num_correct_drafts_per_req, self._drafter.won_seconds)

    def forward_batch_generation(
        self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None = None, pp_proxy_tensors: Any = None
    ) -> Any:
        """Run one step. on_publish: receives each request's new length `[n]`, if SGLang overlaps steps."""
        del pp_proxy_tensors
        with torch.no_grad():
            return (self._decode if batch.forward_mode.is_decode() else self._prefill)(batch, on_publish)

    # --- what differs -----------------------------------------------------------------------------------------------

    def _prompts(self, batch: Any) -> None:
        """Note that the target computes these prompts."""

    @abstractmethod
    def _propose(self, batch: Any, step: Step) -> torch.Tensor:
        """Return the drafts `[n, width - 1]` int64 of a step with drafts."""

    def _undrafted(self, slots: torch.Tensor) -> None:
        """Note that the target writes tokens to these slots `[m]` that were not drafted."""

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prefill(self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None) -> Any:
        """Compute the target's own step; its token is a run of length 1."""
        result = self.target_worker.forward_batch_generation(batch)
        self._drafter.prefilled(batch.reqs)
        self._prompts(batch)
        self._checked -= {request.rid for request in batch.reqs}
        lengths = batch.seq_lens.clone()
        if on_publish is not None:
            on_publish(lengths)
        result.accept_lens = self._one_each(len(batch.reqs), on_host=on_publish is not None)
        result.new_seq_lens = lengths
        tokens = result.next_token_ids.view(-1, 1)
        result.next_draft_input = self._carried(tokens, result.accept_lens, lengths, is_relayed=on_publish is not None)
        result.speculative_num_draft_tokens = self.speculative_num_draft_tokens
        return result

    # --- tokens -----------------------------------------------------------------------------------------------------

    def _decode(self, batch: Any, on_publish: Callable[[torch.Tensor], None] | None) -> Any:
        step = self._drafter.plan(batch.reqs, functools.partial(self._newest_runs, batch))
        width = step.width
        self._counters.step(batch.reqs, width, step.n_drafts)
        tokens = _newest(batch.spec_info)[:, None]
        positions = batch.seq_lens[:, None]
        if width > 1:
            tokens = torch.cat((tokens, self._propose(batch, step)), 1)
            positions = positions + torch.arange(width, device=self._device)
        self._checked = {request.rid for request in batch.reqs} if width > 1 else set()
        output, recorded = run_chain(self.target_worker, self._graphs, batch, tokens, positions)
        batch.forward_mode = ForwardMode.DECODE
        self._undrafted(batch.out_cache_loc.view(-1, width)[:, -1])
        drawn = draw(self._runner.sampler, batch, output, tokens, positions.flatten())
        if width > 1:
            lens = accepted(tokens, drawn, self._on_device(step.n_drafts))
            lengths = batch.seq_lens + lens
        else:
            lens = self._one_each(len(drawn), on_host=on_publish is not None)
            lengths = batch.seq_lens + 1
        if on_publish is not None:
            on_publish(lengths)
        reported = drawn.int()
        return GenerationBatchResult(
            logits_output=output,
            next_token_ids=reported.flatten(),
            can_run_cuda_graph=recorded,
            accept_lens=lens,
            new_seq_lens=lengths,
            next_draft_input=self._carried(reported, lens, lengths, is_relayed=on_publish is not None),
            speculative_num_draft_tokens=width,
        )

    def _carried(self, runs: torch.Tensor, lens: torch.Tensor, lengths: torch.Tensor, *, is_relayed: bool) -> Any:
        """Return the next step's input: runs `[n, width]`, padded to the one width that SGLang carries.

        The relay takes single tokens without padding.
        """
        width = runs.shape[1]
        carried_width = 1 if is_relayed and width == 1 else self.speculative_num_draft_tokens
        if carried_width > width:
            runs = torch.nn.functional.pad(runs, (0, carried_width - width))
        carried = NgramVerifyInput(
            draft_token_num=carried_width, new_seq_lens=lengths, accept_tokens=runs.int().flatten(), accept_lens=lens
        )
        carried.in_flight = width
        return carried

    def _one_each(self, n: int, *, on_host: bool) -> torch.Tensor:
        """Return ones `[n]`, which callers must not change. SGLang copies them to the host; its relay ignores them."""
        if (n, on_host) not in self._ones:
            device = torch.device("cpu") if on_host else self._device
            self._ones[n, on_host] = torch.ones(n, dtype=torch.int32, device=device)
        return self._ones[n, on_host]

    def _on_device(self, values: Sequence[Any]) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.tensor(values, dtype=torch.int64, pin_memory=pinned).to(self._device, non_blocking=True)

    def _newest_runs(self, batch: Any) -> list[tuple[int, list[int]]]:
        """Return each request's length and its tokens of the last step; this waits for the device."""
        carried, columns = batch.spec_info, [batch.seq_lens[:, None], _newest(batch.spec_info)[:, None]]
        if self._checked:
            runs, lens = _runs(carried)
            columns += [lens[:, None], runs]
        facts = torch.cat(columns, 1).tolist()
        return [
            (length + 1, run[1 : 1 + run[0]] if request.rid in self._checked else [newest])
            for request, (length, newest, *run) in zip(batch.reqs, facts, strict=True)
        ]


class LookupWorker(ChainWorker):
    """Prompt lookup. It has no draft model: SGLang's pools and weights are only the target's."""

    def _propose(self, batch: Any, step: Step) -> torch.Tensor:
        del batch
        return self._on_device(step.drafts)


class DraftWorker(ChainWorker):
    """A draft model beside the target."""

    search = staticmethod(Text.guess)

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any) -> None:
        """SGLang calls it with these names, before any pool exists."""
        rows = most_rows(target_worker.model_runner.device)
        self._draft = DraftModel(server_args, gpu_id, nccl_port, target_worker, rows)
        self.draft_cost = self._draft.cost
        super().__init__(server_args, gpu_id, nccl_port, target_worker)

    def alloc_memory_pool(self, **pools: Any) -> None:
        """Share the target's slots with the draft model."""
        super().alloc_memory_pool(**pools)
        self._draft.alloc_memory_pool(**pools)

    def init_attention_backends(self) -> None:
        """Create the draft model's; SGLang has created the target's."""
        self._draft.init_attention_backends()

    def init_cuda_graphs(self) -> None:
        """Record the steps of both models."""
        super().init_cuda_graphs()
        self._draft.record()

    def _prompts(self, batch: Any) -> None:
        if batch.forward_mode.is_idle():
            return
        if self._drafter.has_hope:
            self._draft.prefilled(batch)
        else:
            self._draft.forget(batch.out_cache_loc)

    def _propose(self, batch: Any, step: Step) -> torch.Tensor:
        if self._draft.catch_up(batch, step.texts):
            self._drafter.prepared()
        return self._draft.propose(batch, step)

    def _undrafted(self, slots: torch.Tensor) -> None:
        self._draft.forget(slots)


def _newest(carried: Any) -> torch.Tensor:
    """Return the last token of each request's run, `[n]` int64."""
    relayed: torch.Tensor | None = getattr(carried, "newest", None)
    if relayed is not None:
        return relayed
    runs, lens = _runs(carried)
    return runs.gather(1, lens[:, None].long() - 1)[:, 0].long()


def _runs(carried: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens `[n, width]` of the last step, and each request's number of accepted ones, `[n]`."""
    relay = getattr(carried, "relay", None)
    if relay is not None:
        found: tuple[torch.Tensor, torch.Tensor] = relay.runs(carried.future_indices)
        return found
    return carried.accept_tokens.view(len(carried.accept_lens), -1), carried.accept_lens
