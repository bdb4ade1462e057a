"""The worker itself, with SGLang's classes and a model that is a function: runs, widths, counters, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_pascal.speculation import counters as spec_counters
from sglang_pascal.speculation.drafting import Drafter

pytestmark = pytest.mark.filterwarnings("ignore:Only CUDA")  # of SGLang's imports
VOCABULARY, CONTEXT = 97, 600
NEUTRAL = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}


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

    def __init__(self, monkeypatch, n, *, overlap):
        from sglang_pascal.speculation.counters import Counters
        from sglang_pascal.speculation.graphs import RecordedWidths
        from sglang_pascal.speculation.worker import LookupWorker

        self.overlap, self.time, self.late, self.kv = overlap, 0.0, [], torch.zeros(n * CONTEXT, dtype=torch.long)
        self.steps = []
        worker = self.worker = LookupWorker.__new__(LookupWorker)
        worker._target_worker = SimpleNamespace(forward_batch_generation=self.forward)
        worker._runner = SimpleNamespace(sampler=self.sample)
        worker._device = torch.device("cpu")
        worker.speculative_num_draft_tokens, worker._is_one_each = 8, True
        worker._graphs = RecordedWidths(SimpleNamespace(decode_cuda_graph_runner=None), [1, 2, 4, 8], 16)
        worker._drafter = Drafter(
            widths=worker._graphs.widths,
            most_rows=16,
            row_cost=0.02,
            context_length=CONTEXT,
            clock=lambda: self.time,
        )
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
            rid=str(i), origin_input_ids_unpadded=prompt, output_ids=[], sampling_params=parameters, grammar=None
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
        return SimpleNamespace(
            reqs=self.requests,
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
