"""Sliding windows, soft caps and SGLang's second KV pool, against transformers."""

from __future__ import annotations

import concurrent.futures

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own"), pytest.mark.timeout(1200)]

LENGTHS = (1, 7, 8, 9, 33, 100)
"""Around the window of 8, and over several chunks of 32."""


def prompt(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 290, (length,), generator=generator).tolist()


def expected_log_probabilities(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.tensor([logits[position, token] for position, token in enumerate(ids[1:])])


@pytest.mark.parametrize("length", [n for n in LENGTHS if n > 1])
def test_prefill(gemma_engine, tiny_model, length):
    ids = prompt(length)
    answer = gemma_engine.generate(ids, 1, return_logprob=True, logprob_start_len=0)
    found = torch.tensor([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])
    torch.testing.assert_close(found, expected_log_probabilities(tiny_model("gemma2").model, ids), atol=1e-3, rtol=0)


def test_decode_of_several_requests_at_once(gemma_engine, tiny_model):
    """The probabilities of what was generated are those that transformers gives to the same text."""
    with concurrent.futures.ThreadPoolExecutor(len(LENGTHS)) as pool:
        answers = list(pool.map(lambda n: gemma_engine.generate([5, *prompt(n)], 24, return_logprob=True), LENGTHS))
    for length, answer in zip(LENGTHS, answers, strict=True):
        ids = [5, *prompt(length), *answer["output_ids"]]
        expected = expected_log_probabilities(tiny_model("gemma2").model, ids)[length:]
        found = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
