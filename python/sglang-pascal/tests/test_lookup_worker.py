"""The workers themselves, with SGLang's classes and models that are functions: runs, widths, counters, no engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_pascal.speculation import counters as spec_counters
from sglang_pascal.speculation.drafting import Drafter

pytestmark = [pytest.mark.imports_sglang, pytest.mark.filterwarnings("ignore:Only CUDA")]
VOCABULARY, CONTEXT = 97, 600
NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}


DRAFT_SECONDS = 0.05
"""Of a draft model's pass; a step of the target takes one second."""


class Counted:
    """Stands for a prometheus counter."""

    def __init__(self):
        self.values = {}

    def labels(self, **labels):
        key = next(iter(labels.values()))
        return SimpleNamespace(inc=lambda n=1: self.values.__setitem__(key, self.values.get(key, 0) + n))

    def set(self, value):
        self.values["set"] = value


def erratic(text):
    """Text that repeats itself for a while, then continues elsewhere."""
    place = (sum(text) * 31 + len(text)) % VOCABULARY
    return text[-12] if place > 8 and len(text) > 12 else place


class Engine:
    """SGLang's scheduler and target model, as far as the worker sees them."""

    def __init__(self, monkeypatch, n, *, overlap, draft=None):
        """draft: what a draft model's next token is; None = prompt lookup."""
        from sglang_pascal.speculation.counters import Counters
        from sglang_pascal.speculation.graphs import RecordedWidths
        from sglang_pascal.speculation.worker import DraftWorker, LookupWorker

        self.overlap, self.time, self.late, self.kv = overlap, 0.0, [], torch.zeros(n * CONTEXT, dtype=torch.long)
        self.steps, kind = [], DraftWorker if draft else LookupWorker
        worker = self.worker = kind.__new__(kind)
        worker._target_worker = SimpleNamespace(forward_batch_generation=self.forward)
        worker._runner = SimpleNamespace(sampler=self.sample)
        worker._device = torch.device("cpu")
        worker.speculative_num_draft_tokens, worker._checked, worker._ones = 8, set(), {}
        worker._graphs = RecordedWidths(SimpleNamespace(decode_cuda_graph_runner=None), [1, 2, 4, 8], 16)
        worker._drafter = Drafter(
            widths=worker._graphs.widths,
            most_rows=16,
            row_cost=0.02,
            context_length=CONTEXT,
            search=worker.search,
            draft_cost=DRAFT_SECONDS,
            clock=lambda: self.time,
        )
        if draft:
            self.model = worker._draft = draft_model(self, draft)
        counters = worker._counters = Counters.__new__(Counters)
        counters._drafted, counters._accepted, counters._checks = Counted(), Counted(), Counted()
        counters._steps, counters._won, counters._launched = Counted(), Counted(), spec_counters.deque(maxlen=4)
        monkeypatch.setattr(type(worker), "target_worker", property(lambda self: self._target_worker), raising=False)
        self.table = torch.arange(n * CONTEXT).view(n, CONTEXT)
        self.requests = [self.request(i, [i, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]) for i in range(n)]
        self.prefill()

    def request(self, i, prompt):
        parameters = SimpleNamespace(**NEUTRAL, max_new_tokens=CONTEXT, top_k=1)
        self.kv[i * CONTEXT : i * CONTEXT + len(prompt)] = torch.tensor(prompt)
        return SimpleNamespace(
            rid=str(i),
            origin_input_ids_unpadded=prompt,
            output_ids=[],
            sampling_params=parameters,
            grammar=None,
            finished=lambda: False,
        )

    def batch(self, mode):
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        n = len(self.requests)
        info = SimpleNamespace(
            **dict.fromkeys(("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "logit_bias")),
            acc_additive_penalties=None,
            acc_scaling_penalties=None,
            is_all_greedy=True,
        )
        prompts = [each.origin_input_ids_unpadded for each in self.requests]
        return SimpleNamespace(
            reqs=self.requests,
            input_ids=torch.tensor([token for prompt in prompts for token in prompt]),
            out_cache_loc=torch.tensor([i * CONTEXT + j for i, each in enumerate(prompts) for j in range(len(each))]),
            extend_input_logprob_token_ids=None,
            forward_mode=ForwardMode[mode],
            seq_lens=self.lengths,
            spec_info=self.carried,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            req_pool_indices=torch.arange(n),
            sampling_info=info,
            return_logprob=False,
            has_grammar=False,
        )

    def prefill(self):
        self.lengths = torch.tensor([len(each.origin_input_ids_unpadded) for each in self.requests])
        self.carried, self.first = None, True
        self.finish(self.worker.forward_batch_generation(self.batch("EXTEND")))

    def forward(self, batch, is_verify=False):
        if not is_verify:
            tokens = [erratic(each.origin_input_ids_unpadded) for each in self.requests]
            return SimpleNamespace(next_token_ids=torch.tensor(tokens))
        n, width = len(batch.reqs), batch.spec_info.draft_token_num
        self.kv[batch.out_cache_loc] = batch.input_ids
        logits = torch.zeros(n * width, VOCABULARY)
        for row, position in enumerate(batch.spec_info.positions.tolist()):
            first = row // width * CONTEXT
            logits[row, erratic(self.kv[first : first + position + 1].tolist())] = 1.0
        self.time += 1.0 + 0.02 * (n * width - n)
        return SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=logits, hidden_states=None), can_run_cuda_graph=False
        )

    def sample(self, output, _info, *_):
        return output.next_token_logits.argmax(-1)

    def finish(self, result):
        self.lengths, self.carried = result.new_seq_lens, result.next_draft_input
        stride = len(result.next_token_ids) // len(self.requests)
        runs = result.next_token_ids.view(-1, stride).tolist()
        lens = result.accept_lens.tolist()
        results = [(each, run[:n]) for each, run, n in zip(self.requests, runs, lens, strict=True)]
        if self.first:
            self.process(results, None)
            self.first = False
        elif self.overlap:
            done, self.late = self.late, [(results, lens)]
            for each in done:
                self.process(*each)
        else:
            self.process(results, lens)

    def process(self, results, lens):
        for request, run in results:
            request.output_ids.extend(run)
        if lens is not None:
            self.worker.on_verify_complete_cpu([n - 1 for n in lens], len(lens))

    def decode(self):
        result = self.worker.forward_batch_generation(self.batch("DECODE"))
        self.steps.append(result.speculative_num_draft_tokens)
        self.finish(result)


def alone(prompt, n):
    text = list(prompt)
    while len(text) < len(prompt) + n:
        text.append(erratic(text))
    return text[len(prompt) :]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_tokens_are_those_of_the_model_alone(monkeypatch, n, overlap):
    engine = Engine(monkeypatch, n, overlap=overlap)
    for _ in range(100):
        engine.decode()
    for request in engine.requests:
        assert request.output_ids == alone(request.origin_input_ids_unpadded, len(request.output_ids))
    assert {1, 8 if n == 1 else 4} <= set(engine.steps)
    counters = engine.worker._counters
    right = counters._accepted.values["greedy"]
    known = sum(len(request.output_ids) - 1 for request in engine.requests)
    assert right == known - n * (100 - overlap)
    assert counters._drafted.values["greedy"] >= right > counters._checks.values["greedy"] > 0
    assert sum(counters._steps.values.values()) == 100
    assert counters._won.values["set"] > 0


def draft_model(engine, next_token):
    """A draft model that remembers which token it computed in which slot, and reads its text from there."""
    from sglang_pascal.speculation.draft_model import DraftModel
    from sglang_pascal.speculation.graphs import RecordedWidths

    model, computed = DraftModel.__new__(DraftModel), torch.full_like(engine.kv, -1)

    def forward(batch, is_verify):
        assert is_verify
        engine.time += DRAFT_SECONDS
        computed[batch.out_cache_loc] = batch.input_ids
        if batch.spec_info is None:
            return None
        logits = torch.zeros(len(batch.input_ids), VOCABULARY)
        for row, position in enumerate(batch.spec_info.positions.tolist()):
            request = row // batch.spec_info.draft_token_num
            text = computed[request * CONTEXT :][: position + 1].tolist()
            prompt, known = engine.requests[request].origin_input_ids_unpadded, int(engine.lengths[request])
            assert text[:known] == (prompt + alone(prompt, known))[: min(known, len(text))]
            logits[row, next_token(text)] = 1.0
        return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits), can_run_cuda_graph=False)

    model._worker, model._chunk = SimpleNamespace(forward_batch_generation=forward), 7
    model._graphs = RecordedWidths(SimpleNamespace(decode_cuda_graph_runner=None), [1, 2], 16)
    model._is_computed = torch.zeros(len(engine.kv), dtype=torch.bool)
    return model


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 4, 8])
def test_a_draft_model_that_is_right_saves_most_steps(monkeypatch, n, overlap):
    engine = Engine(monkeypatch, n, overlap=overlap, draft=erratic)
    for _ in range(40):
        engine.decode()
    for request in engine.requests:
        assert request.output_ids == alone(request.origin_input_ids_unpadded, len(request.output_ids))
    counters = engine.worker._counters
    assert counters._accepted.values["greedy"] >= counters._drafted.values["greedy"] - n * 7 * overlap > 0
    assert engine.steps.count({1: 8, 4: 4, 8: 2}[n]) > 30


def test_a_draft_model_catches_up_after_steps_without_it(monkeypatch):
    """Its passes read the text from its own slots, which `draft_model` compares with the true text."""
    engine = Engine(monkeypatch, 2, overlap=True, draft=erratic)
    drafter = engine.worker._drafter
    looks = drafter._looks
    for step in range(60):
        drafter._looks = looks if step < 15 or step > 40 else lambda n: False
        engine.decode()
    assert set(engine.steps[16:41]) == {1}
    assert engine.steps[41:].count(8) + engine.steps[41:].count(4) > 10
    for request in engine.requests:
        assert request.output_ids == alone(request.origin_input_ids_unpadded, len(request.output_ids))


def test_a_draft_model_that_is_wrong_is_soon_left_alone(monkeypatch):
    engine = Engine(monkeypatch, 2, overlap=True, draft=lambda text: (erratic(text) + 1) % VOCABULARY)
    for _ in range(200):
        engine.decode()
    assert engine.worker._counters._accepted.values.get("greedy", 0) == 0
    assert engine.steps[20:].count(1) > 170
    for request in engine.requests:
        assert request.output_ids == alone(request.origin_input_ids_unpadded, len(request.output_ids))
    engine.worker._prompts(engine.batch("EXTEND"))
    assert not engine.model._is_computed[: len(engine.requests[0].origin_input_ids_unpadded)].any()


def test_no_prompt_is_computed_where_another_trial_is_due_but_no_draft_is_worth_a_check(monkeypatch):
    engine = Engine(monkeypatch, 2, overlap=True, draft=erratic)
    drafter = engine.worker._drafter
    assert drafter.has_hope
    for _ in range(20):
        drafter._texts._guesses.note(7, 6, 0)
    assert not drafter.has_hope
    assert drafter._accounts.has_hope(2)


def test_what_a_draft_model_lacks_is_counted_from_the_first_gap(monkeypatch):
    engine = Engine(monkeypatch, 1, overlap=False, draft=erratic)
    batch, model = engine.batch("DECODE"), engine.model
    assert model.behind(batch, 15) == [0]
    model.forget(torch.tensor([5, 9]))
    assert model.behind(batch, 15) == [9]
