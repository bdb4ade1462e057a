"""The real SGLang with a draft model: the same answers, whether its drafts are right or wrong.

A request with a penalty is not drafted for, and one of a billionth changes nothing, so the same engine says what an
answer is without drafts.
"""

from __future__ import annotations

import concurrent.futures
import json

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine"), pytest.mark.timeout(1800)]

N_TOKENS = 40
UNDRAFTED = {"presence_penalty": 1e-9}
PROMPTS = [[5 + (7 * i * i + 11 * j) % 250 for j in range(9 + 40 * i)] for i in range(4)]
"""The longest has five chunks."""


def answer(engine, ids, *, more=None, **sampling):
    parameters = {"temperature": 0, "max_new_tokens": N_TOKENS, "ignore_eos": True} | sampling
    found = engine.client.post("/generate", json={"input_ids": ids, "sampling_params": parameters} | (more or {}))
    found.raise_for_status()
    return found.json()


@pytest.fixture(scope="module")
def alone(draft_engine):
    """What each prompt gets without drafts."""
    engine, _ = draft_engine
    answers = [answer(engine, ids, **UNDRAFTED) for ids in PROMPTS]
    assert [each["meta_info"]["spec_verify_ct"] for each in answers] == [N_TOKENS - 1] * len(PROMPTS)
    return [each["output_ids"] for each in answers]


def all_at_once(engine, n):
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda ids: answer(engine, ids), PROMPTS[:n]))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_model_that_drafts_for_itself_is_always_right(draft_engine, alone, n):
    """Rows of a step: 16 of all requests, so up to seven drafts of two requests and three of four."""
    engine, wrong = draft_engine
    wrong.unlink(missing_ok=True)
    answers = all_at_once(engine, n)
    assert [each["output_ids"] for each in answers] == alone[:n]
    least = {1: 7.0, 2: 5.0, 4: 2.5}[n]
    assert all(each["meta_info"]["spec_accept_length"] > least * 0.8 for each in answers)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_wrong_drafts_change_no_token(draft_engine, alone, n):
    engine, wrong = draft_engine
    wrong.touch()
    answers = all_at_once(engine, n)
    wrong.unlink()
    assert [each["output_ids"] for each in answers] == alone[:n]
    assert all(each["meta_info"]["spec_accept_length"] < 1.2 for each in answers)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.9, "top_p": 0.9, "sampling_seed": 7}, {"logit_bias": {"28": 4.0}}]
)
def test_sampled_answers_are_the_same_with_a_seed(draft_engine, sampling):
    engine, _ = draft_engine
    drafted, plain = (answer(engine, PROMPTS[1], **sampling, **more) for more in ({}, UNDRAFTED))
    assert drafted["output_ids"] == plain["output_ids"]


def test_log_probabilities_are_the_same(draft_engine):
    engine, _ = draft_engine
    drafted, plain = (
        answer(engine, PROMPTS[2], more={"return_logprob": True, "top_logprobs_num": 2}, **sampling)["meta_info"]
        for sampling in ({}, UNDRAFTED)
    )
    values = [[entry[0] for entry in each["output_token_logprobs"]] for each in (drafted, plain)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_grammar_is_obeyed_with_drafts(draft_engine):
    """The draft model knows nothing of it, so its drafts are seldom right."""
    engine, _ = draft_engine
    items = {"type": "array", "items": {"enum": ["aa", "ab"]}, "minItems": 6, "maxItems": 8}
    schema = json.dumps({"type": "object", "properties": {"w": items}, "required": ["w"]})
    options = {"json_schema": schema, "ignore_eos": False, "max_new_tokens": 90}
    drafted, plain = (answer(engine, PROMPTS[0], **options, **more)["text"] for more in ({}, UNDRAFTED))
    assert drafted == plain
    assert len(json.loads(drafted)["w"]) >= 6


def test_a_stop_string_inside_a_run_ends_the_answer(draft_engine):
    engine, _ = draft_engine
    whole = answer(engine, PROMPTS[3])["text"]
    stop = whole[len(whole) // 2 :][:5]
    drafted, plain = (answer(engine, PROMPTS[3], stop=[stop], ignore_eos=False, **more) for more in ({}, UNDRAFTED))
    assert drafted["text"] == plain["text"] == whole[: whole.index(stop)]
    assert drafted["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_stream_has_the_whole_text_in_fewer_events(draft_engine):
    engine, _ = draft_engine
    whole = answer(engine, PROMPTS[1])["text"]
    body = {"input_ids": PROMPTS[1], "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": N_TOKENS, "ignore_eos": True}
    with engine.client.stream("POST", "/generate", json=body) as found:
        events = [json.loads(line[6:]) for line in found.iter_lines() if line.startswith("data: {")]
    assert events[-1]["text"] == whole
    assert 1 < len(events) < N_TOKENS / 2


def test_a_prompt_that_was_computed_before_is_drafted_for_at_once(draft_engine, alone):
    """An answer without drafts is in the prefix cache; the draft model computes what it lacks of it."""
    engine, _ = draft_engine
    ids = PROMPTS[3] + alone[3][:30]
    found = answer(engine, ids, max_new_tokens=10)
    assert found["output_ids"] == alone[3][30:40]
    assert found["meta_info"]["cached_tokens"] > len(PROMPTS[3])
    assert found["meta_info"]["spec_verify_ct"] <= 3


def test_an_aborted_request_leaves_the_others_alone(draft_engine, alone):
    engine, _ = draft_engine
    body = {"input_ids": PROMPTS[2], "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
    with engine.client.stream("POST", "/generate", json=body) as left:
        next(left.iter_lines())
        other = answer(engine, PROMPTS[0])
    assert other["output_ids"] == alone[0]
    assert answer(engine, PROMPTS[1])["output_ids"] == alone[1]
