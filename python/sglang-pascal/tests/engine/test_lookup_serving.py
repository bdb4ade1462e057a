"""The real SGLang with prompt lookup beside one without: the same answers, in fewer steps where text repeats."""

from __future__ import annotations

import collections
import concurrent.futures
import json

import httpx
import pytest
import transformers

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts two real engines"), pytest.mark.timeout(1800)]

TEXT = (
    "The keeper of the lighthouse climbed the narrow stairs every evening before the sun went down. He carried a small "
    "lamp, a tin of oil and a notebook with the names of the ships that passed. In winter the wind was so strong that "
    "the windows shook, and he heard the waves far below."
)
N_TOKENS = 120


@pytest.fixture(scope="module")
def prompts(engine):
    """Name -> token ids: text that repeats, and text that does not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(engine.folder)

    def chat(text):
        found = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        return list(found if isinstance(found, list) else found["input_ids"])

    return {
        "copy": tokenizer(f"{TEXT}\n\n{TEXT}\n\n{TEXT[:40]}")["input_ids"],
        "repeat": chat(f"Repeat this paragraph word for word:\n\n{TEXT}"),
        "free": chat("Write a letter to my landlord about the broken heating."),
        "short": tokenizer("Once upon a time")["input_ids"],
    }


@pytest.fixture(scope="module")
def alone(engine, prompts):
    """What each gets without speculation."""
    return {name: engine.generate(ids, N_TOKENS)["output_ids"] for name, ids in prompts.items()}


def sampled(engine, ids, n_tokens=40, more=None, **sampling):
    parameters = {"temperature": 0, "max_new_tokens": n_tokens, "ignore_eos": True} | sampling
    answer = engine.client.post("/generate", json={"input_ids": ids, "sampling_params": parameters} | (more or {}))
    answer.raise_for_status()
    return answer.json()


def test_greedy_tokens_are_the_same_in_fewer_steps(lookup_engine, prompts, alone):
    """A busy machine can make checks look dear, so that there are none for a while: then it is asked again."""

    def steps(name):
        answer = lookup_engine.generate(prompts[name], N_TOKENS)
        assert answer["output_ids"] == alone[name], name
        return answer["meta_info"]["spec_verify_ct"]

    for name, most in {"copy": N_TOKENS / 3, "repeat": N_TOKENS / 1.5, "free": N_TOKENS, "short": N_TOKENS}.items():
        assert any(steps(name) <= most for _ in range(5)), name


def test_requests_of_all_lengths_at_once_and_aborts_change_no_token(lookup_engine, prompts, alone):
    jobs = [(name, n) for n in (N_TOKENS, 7, 33, 80) for name in prompts]

    def leave(ids):
        """Ask for a long answer and hang up after its beginning."""
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 600, "ignore_eos": True}, "stream": True}
        with httpx.stream("POST", f"{lookup_engine.url}/generate", json=body, timeout=300) as answer:
            next(answer.iter_lines())

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        left = [pool.submit(leave, ids) for ids in prompts.values()]
        answers = list(pool.map(lambda job: lookup_engine.generate(prompts[job[0]], job[1])["output_ids"], jobs))
        for each in left:
            each.result()
    assert answers == [alone[name][:n] for name, n in jobs]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 7},
        {"temperature": 0.7, "top_k": 20, "min_p": 0.05, "sampling_seed": 9},
        {"frequency_penalty": 0.7},
        {"presence_penalty": 0.7},
        {"repetition_penalty": 1.2},
        {"logit_bias": {"28": 4.0}},
    ],
    ids=lambda sampling: next(reversed(sampling)),
)
def test_sampling_parameters_give_the_same_tokens(engine, lookup_engine, prompts, sampling):
    """With a seed, a token depends on the seed and its position only, so sampled answers can be compared."""
    found = [sampled(each, prompts["repeat"], **sampling)["output_ids"] for each in (engine, lookup_engine)]
    assert found[0] == found[1]


def test_log_probabilities_are_the_same(engine, lookup_engine, prompts):
    more = {"return_logprob": True, "top_logprobs_num": 2}
    for sampling in ({}, {"temperature": 0.7, "sampling_seed": 3}):
        plain, lookup = (
            sampled(each, prompts["copy"], more=more, **sampling)["meta_info"] for each in (engine, lookup_engine)
        )
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert len(lookup[name]) == 40
        expected = [entry[0] for entry in plain["output_token_logprobs"]]
        assert [entry[0] for entry in lookup["output_token_logprobs"]] == pytest.approx(expected, abs=1e-4)
        top = [[token for _, token, _ in row] for row in plain["output_top_logprobs"]]
        assert [[token for _, token, _ in row] for row in lookup["output_top_logprobs"]] == top


def test_a_stop_string_inside_a_run_ends_the_answer(engine, lookup_engine, prompts):
    found = [
        sampled(each, prompts["copy"], N_TOKENS, stop=["a tin of oil"], ignore_eos=False)
        for each in (engine, lookup_engine)
    ]
    assert found[0]["text"] == found[1]["text"]
    assert found[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "a tin of oil"}


def test_a_grammar_is_obeyed_with_drafts(engine, lookup_engine, prompts):
    items = {"type": "array", "items": {"enum": ["lighthouse", "keeper"]}, "minItems": 6, "maxItems": 8}
    schema = json.dumps({"type": "object", "properties": {"words": items}, "required": ["words"]})
    plain, lookup = (
        sampled(each, prompts["repeat"], N_TOKENS, json_schema=schema, ignore_eos=False)
        for each in (engine, lookup_engine)
    )
    assert lookup["text"] == plain["text"]
    assert len(json.loads(lookup["text"])["words"]) >= 6
    assert lookup["meta_info"]["spec_verify_ct"] < lookup["meta_info"]["completion_tokens"]


def test_a_stream_has_the_whole_text(lookup_engine, prompts):
    whole = sampled(lookup_engine, prompts["copy"], N_TOKENS)["text"]
    body = {"input_ids": prompts["copy"], "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": N_TOKENS, "ignore_eos": True}
    with httpx.stream("POST", f"{lookup_engine.url}/generate", json=body, timeout=300) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["text"] == whole
    assert 1 < len(events) <= N_TOKENS


def test_an_answer_fills_the_context(engine, lookup_engine, prompts):
    """1024 tokens, of which no row may be beyond the last."""
    ids = (prompts["copy"] * 10)[: 1024 - 40]
    found = [sampled(each, ids, 40)["output_ids"] for each in (engine, lookup_engine)]
    assert found[0][: len(found[1])] == found[1]
    assert len(found[1]) > 30  # SGLang keeps one or two of the last free


def test_counters_say_what_was_drafted_and_accepted(lookup_engine, prompts):
    def counts():
        lines = httpx.get(f"{lookup_engine.url}/metrics").text.splitlines()
        found = collections.Counter()
        for series, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#"):
            found[series.partition("{")[0]] += float(value)
        return found

    before = counts()
    answer = lookup_engine.generate(prompts["copy"], N_TOKENS)["meta_info"]
    after = counts()
    grown = {name: after[name] - before[name] for name in after if name.startswith("sglang_pascal:spec_")}
    assert grown["sglang_pascal:spec_accepted_tokens_total"] >= N_TOKENS - 1 - answer["spec_verify_ct"]
    assert grown["sglang_pascal:spec_drafted_tokens_total"] >= grown["sglang_pascal:spec_accepted_tokens_total"]
    assert grown["sglang_pascal:spec_checks_total"] >= grown["sglang_pascal:spec_accepted_tokens_total"] / 7
    assert grown["sglang_pascal:spec_steps_total"] >= answer["spec_verify_ct"]
    assert "sglang_pascal:spec_won_seconds" in after
