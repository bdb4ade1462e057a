"""The host a step behind the device, as SGLang's overlapping scheduler has it: nothing is drafted from a wrong text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from sglang_pascal.speculation.drafting import Drafter
from sglang_pascal.speculation.verification import accepted


@dataclass
class Request:
    """As SGLang has it: what is processed of its answer."""

    rid: str
    origin_input_ids_unpadded: list
    output_ids: list = field(default_factory=list)
    sampling_params: SimpleNamespace = field(default_factory=lambda: parameters())


def parameters(**options):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    return SimpleNamespace(**neutral | {"max_new_tokens": 200} | options)


class Device:
    """A scheduler over a model whose next token depends on the whole text. Results come a step late if it overlaps."""

    def __init__(self, target, *, overlap=True, context_length=10_000, most_rows=16, row_cost=0.02):
        self.target, self.overlap = target, overlap
        self.texts, self.runs, self.pending, self.waits, self.steps = {}, {}, [], 0, []
        self.drafter = Drafter(
            widths=lambda n: [width for width in (1, 2, 4, 8) if width == 1 or n * width <= most_rows],
            most_rows=most_rows,
            row_cost=row_cost,
            context_length=context_length,
            clock=lambda: 0.001 * len(self.steps),
        )

    def prefill(self, *requests):
        self.drafter.prefilled(requests)
        for request in requests:
            text = [*request.origin_input_ids_unpadded, *request.output_ids]
            self.texts[request.rid] = [*text, self.target(text)]
            self.runs[request.rid] = self.texts[request.rid][-1:]
        self._processed([(request, self.runs[request.rid]) for request in requests])

    def decode(self, *requests):
        step = self.drafter.plan(requests, lambda: self._wait(requests))
        self.steps.append(step)
        for request, n_drafts, drafts in zip(requests, step.n_drafts, step.drafts, strict=True):
            text = self.texts[request.rid]
            drawn = [self.target([*text, *drafts[:row]]) for row in range(step.width)]
            tokens = torch.tensor([[text[-1], *drafts]])
            n = int(accepted(tokens, torch.tensor([drawn]), torch.tensor([n_drafts]))[0])
            self.runs[request.rid] = drawn[:n]
            self.texts[request.rid] = [*text, *drawn[:n]]
        self._processed([(request, self.runs[request.rid]) for request in requests])

    def _wait(self, requests):
        self.waits += 1
        return [(len(self.texts[request.rid]), self.runs[request.rid]) for request in requests]

    def _processed(self, results):
        late, self.pending = (self.pending, results) if self.overlap else (results, [])
        for request, run in late:
            request.output_ids.extend(run)

    def flush(self):
        for request, run in self.pending:
            request.output_ids.extend(run)
        self.pending = []


def repeating(period):
    """A model that goes on with what came `period` tokens ago."""
    return lambda text: text[-period]


def erratic(text):
    """A model that quotes its text for a while, then goes on at another place."""
    place = (sum(text) * 31 + len(text)) % 97
    return text[-10] if place > 12 and len(text) > 10 else place % 9


def alone(target, prompt, n):
    text = list(prompt)
    while len(text) < len(prompt) + n:
        text.append(target(text))
    return text[: len(prompt) + n]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("target", [repeating(10), repeating(3), erratic])
def test_the_text_is_that_of_decoding_alone(target, overlap):
    device = Device(target, overlap=overlap)
    request = Request("a", list(range(10)) * 3)
    device.prefill(request)
    for _ in range(60):
        device.decode(request)
    device.flush()
    text = [*request.origin_input_ids_unpadded, *request.output_ids]
    assert text == device.texts["a"] == alone(target, request.origin_input_ids_unpadded, len(request.output_ids))
    assert max(step.width for step in device.steps) == 8


def test_batches_that_change_prefills_between_and_retractions_change_no_token():
    random_ = random.Random(4)
    device = Device(erratic)
    waiting = [Request(str(n), [random_.randrange(9) for _ in range(random_.randrange(4, 40))]) for n in range(12)]
    everyone, running = list(waiting), []
    for _ in range(400):
        if waiting and len(running) < 5 and random_.random() < 0.2:
            running.append(waiting.pop())
            device.prefill(running[-1])
        elif running and random_.random() < 0.05:
            victim = running.pop(random_.randrange(len(running)))  # its result in flight is dropped
            device.pending = [each for each in device.pending if each[0] is not victim]
            waiting.append(victim)
        elif running:
            device.decode(*running)
        for request in [each for each in running if len(each.output_ids) > 150]:
            running.remove(request)  # still in the step that is in flight
    device.flush()
    assert sum(len(request.output_ids) > 100 for request in everyone) > 2
    for request in everyone:
        text = [*request.origin_input_ids_unpadded, *request.output_ids]
        assert text == alone(erratic, request.origin_input_ids_unpadded, len(request.output_ids))
    assert {step.width for step in device.steps} >= {1, 2, 4}


def test_text_that_never_repeats_is_decoded_without_a_wait():
    device = Device(len)
    request = Request("a", [0, 1, 2, 3])
    device.prefill(request)
    for _ in range(100):
        device.decode(request)
    assert device.waits == 0
    assert {step.width for step in device.steps} == {1}


def test_a_request_with_penalties_has_no_drafts():
    device = Device(repeating(5))
    requests = [
        Request(name, [1, 2, 3, 4, 5] * 4, sampling_params=parameters(**{name: value}))
        for name, value in {
            "frequency_penalty": 0.1,
            "presence_penalty": -0.1,
            "repetition_penalty": 1.1,
            "min_new_tokens": 3,
        }.items()
    ]
    device.prefill(*requests)
    for _ in range(10):
        device.decode(*requests)
    assert {step.width for step in device.steps} == {1}


def test_beside_a_request_with_penalties_others_have_drafts():
    device = Device(repeating(5))
    plain = Request("plain", [1, 2, 3, 4, 5] * 4)
    penalised = Request("penalised", [1, 2, 3, 4, 5] * 4, sampling_params=parameters(frequency_penalty=0.5))
    device.prefill(plain, penalised)
    for _ in range(10):
        device.decode(plain, penalised)
    assert all(step.n_drafts[1] == 0 for step in device.steps)
    assert len(device.texts["plain"]) > len(device.texts["penalised"]) == 20 + 11


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 9])
def test_no_more_is_drafted_than_an_answer_may_have(n_tokens):
    device = Device(repeating(5), overlap=False)
    request = Request("a", [1, 2, 3, 4, 5] * 4, sampling_params=parameters(max_new_tokens=n_tokens))
    device.prefill(request)
    while len(request.output_ids) < n_tokens:
        device.decode(request)
    assert len(request.output_ids) == n_tokens


def test_no_row_is_beyond_the_context():
    device = Device(repeating(5), overlap=False, context_length=40)
    request = Request("a", [1, 2, 3, 4, 5] * 4)
    device.prefill(request)
    while len(device.texts["a"]) < 40:
        before = len(device.texts["a"])
        device.decode(request)
        assert before + device.steps[-1].width - 1 <= 40


def test_above_so_many_requests_nothing_is_looked_for():
    device = Device(repeating(5), most_rows=8)
    requests = [Request(str(n), [1, 2, 3, 4, 5] * 4) for n in range(5)]
    device.prefill(*requests)
    for _ in range(10):
        device.decode(*requests)
    for _ in range(10):
        device.decode(*requests[:4])
    assert {step.width for step in device.steps[:10]} == {1}
    assert device.steps[-1].width == 2


def test_what_is_reported_has_the_distribution_of_decoding_alone():
    """Chi-squared of pairs of tokens over a small vocabulary, with drafts that are often right."""
    generator = torch.Generator().manual_seed(11)
    n_tokens, runs = 4, 40_000
    chain = torch.rand(n_tokens, n_tokens, generator=generator).softmax(1)
    drafts = torch.tensor([2, 1]).expand(runs, 2)
    tokens = torch.cat((torch.zeros(runs, 1, dtype=torch.long), drafts), 1)
    drawn = torch.multinomial(chain[tokens].view(-1, n_tokens), 1, generator=generator).view(runs, 3)
    n_reported = accepted(tokens, drawn, torch.full((runs,), 2))
    second = torch.multinomial(chain[drawn[:, 0]], 1, generator=generator)[:, 0]  # where the step reported one token
    second = torch.where(n_reported > 1, drawn[:, 1], second)
    counts = torch.bincount(drawn[:, 0] * n_tokens + second, minlength=n_tokens**2).double()
    expected = (chain[0][:, None] * chain).flatten().double() * runs
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 37.7  # 15 degrees of freedom, p = 0.001
    assert 0.1 < float((n_reported > 1).double().mean()) < 0.9


def test_padding_is_never_accepted():
    tokens, drawn = torch.tensor([[5, 7, 0, 0]]), torch.tensor([[7, 0, 0, 3]])
    assert accepted(tokens, drawn, torch.tensor([1])).tolist() == [2]
    assert accepted(tokens, drawn, torch.tensor([0])).tolist() == [1]
    assert accepted(tokens, drawn, torch.tensor([3])).tolist() == [4]
