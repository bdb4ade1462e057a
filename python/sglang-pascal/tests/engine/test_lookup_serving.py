"""The real SGLang with prompt lookup: the same answers, in fewer steps where text repeats.

A tiny random model soon repeats itself if it is greedy, with exceptions, so that drafts are right and wrong. A request
with a penalty is not drafted for, and one of a billionth changes nothing, so the same engine says what an answer is
without drafts.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json

import httpx
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine"), pytest.mark.timeout(1800)]

N_TOKENS = 60
UNDRAFTED = {"presence_penalty": 1e-9}
PROMPTS = [[5 + (7 * i * i + 11 * j) % 250 for j in range(9 + 40 * i)] for i in range(4)]
"""The longest has five chunks."""
FREE = {"temperature": 1.0, "sampling_seed": 5}
"""Text that does not repeat."""


def answer(engine, ids, n_tokens=N_TOKENS, more=None, **sampling):
    parameters = {"temperature": 0, "max_new_tokens": n_tokens, "ignore_eos": True} | sampling
    found = engine.client.post("/generate", json={"input_ids": ids, "sampling_params": parameters} | (more or {}))
    found.raise_for_status()
    return found.json()


def without_and_with(engine, ids, n_tokens=N_TOKENS, **sampling):
    return [answer(engine, ids, n_tokens, **sampling, **more) for more in (UNDRAFTED, {})]


@pytest.fixture(scope="module")
def alone(lookup_engine):
    """What each prompt gets without drafts."""
    answers = [answer(lookup_engine, ids, **UNDRAFTED) for ids in PROMPTS]
    assert [each["meta_info"]["spec_verify_ct"] for each in answers] == [N_TOKENS - 1] * len(PROMPTS)
    return [each["output_ids"] for each in answers]


def test_greedy_tokens_are_the_same_in_fewer_steps(lookup_engine, alone):
    for ids, expected in zip(PROMPTS, alone, strict=True):
        found = answer(lookup_engine, ids)
        assert found["output_ids"] == expected
        assert found["meta_info"]["spec_verify_ct"] <= N_TOKENS / 1.5
    counted = found["meta_info"]
    assert counted["spec_accept_length"] == pytest.approx((N_TOKENS - 1) / counted["spec_verify_ct"], rel=0.02)


def test_requests_of_all_lengths_at_once_and_aborts_change_no_token(lookup_engine, alone):
    jobs = [(i, n) for n in (N_TOKENS, 7, 33, 50) for i in range(len(PROMPTS))]

    def leave(ids):
        """Ask for a long answer and hang up after its beginning."""
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}, "stream": True}
        with httpx.stream("POST", f"{lookup_engine.url}/generate", json=body, timeout=300) as found:
            next(found.iter_lines())

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        left = [pool.submit(leave, ids) for ids in PROMPTS]
        answers = list(pool.map(lambda job: answer(lookup_engine, PROMPTS[job[0]], job[1])["output_ids"], jobs))
        for each in left:
            each.result()
    assert answers == [alone[i][:n] for i, n in jobs]


@pytest.mark.parametrize(
    "sampling",
    [
        FREE,
        {"temperature": 0.2, "top_p": 0.9, "sampling_seed": 7},
        {"temperature": 0.2, "top_k": 20, "min_p": 0.05, "sampling_seed": 9},
        {"logit_bias": {"28": 4.0}},
    ],
    ids=lambda sampling: next(reversed(sampling)) + str(sampling.get("temperature", "")),
)
def test_sampling_parameters_give_the_same_tokens(lookup_engine, sampling):
    """With a seed, a token depends on the seed and its position only, so sampled answers can be compared."""
    plain, drafted = without_and_with(lookup_engine, PROMPTS[1], **sampling)
    assert drafted["output_ids"] == plain["output_ids"]


@pytest.mark.parametrize(
    "penalty",
    [{"frequency_penalty": 0.7}, {"presence_penalty": 0.7}, {"repetition_penalty": 1.2}],
    ids=lambda each: next(iter(each)),
)
def test_a_penalty_is_exact_beside_requests_with_drafts(lookup_engine, alone, penalty):
    """Its rows of a step that checks the others' drafts are padding."""
    expected = answer(lookup_engine, PROMPTS[0], **penalty)["output_ids"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        others = [pool.submit(answer, lookup_engine, PROMPTS[i], 2 * N_TOKENS) for i in (1, 2)]
        found = answer(lookup_engine, PROMPTS[0], **penalty)
        drafted = [each.result()["output_ids"][:N_TOKENS] for each in others]
    assert found["output_ids"] == expected != alone[0]
    assert drafted == alone[1:3]


def test_log_probabilities_are_the_same(lookup_engine):
    more = {"return_logprob": True, "top_logprobs_num": 2}
    for sampling in ({}, {"temperature": 0.2, "sampling_seed": 3}):
        plain, lookup = (
            each["meta_info"] for each in without_and_with(lookup_engine, PROMPTS[2], more=more, **sampling)
        )
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert len(lookup[name]) == N_TOKENS
        expected = [entry[0] for entry in plain["output_token_logprobs"]]
        assert [entry[0] for entry in lookup["output_token_logprobs"]] == pytest.approx(expected, abs=1e-4)
        top = [[token for _, token, _ in row] for row in plain["output_top_logprobs"]]
        assert [[token for _, token, _ in row] for row in lookup["output_top_logprobs"]] == top


def test_a_stop_string_inside_a_run_ends_the_answer(lookup_engine):
    whole = answer(lookup_engine, PROMPTS[3])["text"]
    stop = whole[len(whole) // 2 :][:5]
    plain, lookup = without_and_with(lookup_engine, PROMPTS[3], stop=[stop], ignore_eos=False)
    assert lookup["text"] == plain["text"] == whole[: whole.index(stop)]
    assert lookup["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_grammar_is_obeyed_with_drafts(lookup_engine):
    items = {"type": "array", "items": {"enum": ["lighthouse", "keeper"]}, "minItems": 6, "maxItems": 8}
    schema = json.dumps({"type": "object", "properties": {"words": items}, "required": ["words"]})
    plain, lookup = without_and_with(lookup_engine, PROMPTS[0], 200, json_schema=schema, ignore_eos=False)
    assert lookup["text"] == plain["text"]
    assert len(json.loads(lookup["text"])["words"]) >= 6
    assert lookup["meta_info"]["spec_verify_ct"] < lookup["meta_info"]["completion_tokens"]


def test_a_stream_has_the_whole_text(lookup_engine):
    whole = answer(lookup_engine, PROMPTS[1])["text"]
    body = {"input_ids": PROMPTS[1], "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": N_TOKENS, "ignore_eos": True}
    with httpx.stream("POST", f"{lookup_engine.url}/generate", json=body, timeout=300) as found:
        events = [json.loads(line[6:]) for line in found.iter_lines() if line.startswith("data: {")]
    assert events[-1]["text"] == whole
    assert 1 < len(events) <= N_TOKENS


def test_an_answer_fills_the_context(lookup_engine):
    """512 tokens, of which no row may be beyond the last."""
    ids = (PROMPTS[3] * 4)[: 512 - 40]
    plain, lookup = without_and_with(lookup_engine, ids, 40)
    assert plain["output_ids"][: len(lookup["output_ids"])] == lookup["output_ids"]
    assert len(lookup["output_ids"]) > 30  # SGLang keeps one or two of the last free


def test_counters_say_what_was_drafted_and_accepted(lookup_engine):
    def counts():
        lines = httpx.get(f"{lookup_engine.url}/metrics").text.splitlines()
        found = collections.Counter()
        for series, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#"):
            found[series.partition("{")[0]] += float(value)
        return found

    before = counts()
    found = answer(lookup_engine, PROMPTS[3])["meta_info"]
    after = counts()
    grown = {name: after[name] - before[name] for name in after if name.startswith("sglang_pascal:spec_")}
    assert grown["sglang_pascal:spec_accepted_tokens_total"] >= N_TOKENS - 1 - found["spec_verify_ct"] > 20
    assert grown["sglang_pascal:spec_drafted_tokens_total"] >= grown["sglang_pascal:spec_accepted_tokens_total"]
    assert grown["sglang_pascal:spec_checks_total"] >= grown["sglang_pascal:spec_accepted_tokens_total"] / 7
    assert grown["sglang_pascal:spec_steps_total"] >= found["spec_verify_ct"]
    assert "sglang_pascal:spec_won_seconds" in after
