"""Lengths, prompts and arrivals: decided by the seed alone, and what they say they are."""

from __future__ import annotations

import hashlib
import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.bench.experiment import (
    batch_points,
    context_points,
    reason_to_skip,
    requests_of,
    serve_points,
    warmup_of,
)
from pascaline.bench.workload import (
    BEGUN_TOKENS,
    NONCE_TOKENS,
    REQUESTS_BY_WORKLOAD,
    SHIPPED_TEXT,
    Prompts,
    Workload,
    arrival_times,
    make_requests,
    parse_lengths,
    shipped_text,
)
from pascaline.engines.server import Server
from pascaline.errors import ConfigurationError

TOKENS = list(range(1000, 3000))
PROMPTS = Prompts(TOKENS)


def draws(text: str, count: int = 4000) -> list[int]:
    lengths, source = parse_lengths("--prompt-tokens", text), random.Random(1)
    return [lengths.draw(source) for _ in range(count)]


def test_each_form_of_lengths_has_the_distribution_that_it_names() -> None:
    assert set(draws("128")) == {128}
    uniform = draws("64-256")
    assert (min(uniform), max(uniform)) == (64, 256)
    normal = draws("normal:1000:50")
    assert statistics.fmean(normal) == pytest.approx(1000, abs=5)
    assert statistics.stdev(normal) == pytest.approx(50, rel=0.1)
    assert statistics.median(draws("lognormal:128:0.7")) == pytest.approx(128, rel=0.05)


@given(st.sampled_from(["1", "1-3", "normal:1:100", "lognormal:1:3"]), st.integers())
def test_no_length_is_below_one(text: str, seed: int) -> None:
    assert parse_lengths("--x", text).draw(random.Random(seed)) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "--prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got 'many'"),
        ("-5", "--prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got '-5'"),
        ("0", "--prompt-tokens: lengths must be at least 1 token and ascending, got '0'"),
        ("9-3", "--prompt-tokens: lengths must be at least 1 token and ascending, got '9-3'"),
        (
            "normal:1.2.3:1",
            "--prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got 'normal:1.2.3:1'",
        ),
        ("²", "--prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got '²'"),
        ("2-1048577", "--prompt-tokens: lengths must be at most 1048576 tokens, got '2-1048577'"),
        ("lognormal:128:500", "--prompt-tokens: sigma must be at most 10, got 'lognormal:128:500'"),
    ],
)
def test_lengths_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_lengths("--prompt-tokens", text)
    assert str(caught.value) == message


@given(st.integers(1, 5000), st.integers())
def test_prompts_of_token_ids_are_exactly_as_long_as_wanted(length: int, seed: int) -> None:
    prompt = PROMPTS.make(random.Random(seed), length)
    assert len(prompt) == length
    assert set(prompt) <= set(TOKENS)


def test_no_two_prompts_share_the_prefix_that_a_cache_could_keep() -> None:
    source = random.Random(1)
    starts = [tuple(PROMPTS.make(source, 64)[:NONCE_TOKENS]) for _ in range(500)]
    assert len(set(starts)) == len(starts)


def test_prompts_of_text_are_as_long_as_the_density_says() -> None:
    prompt = Prompts(None, 4.0).make(random.Random(1), 200)
    assert isinstance(prompt, str)
    assert len(prompt) == 800


REQUESTED = Prompts(TOKENS, requests={"edit": [7001, 7002], "quote": [7003]})


@given(st.integers(40, 5000), st.integers(), st.sampled_from(["edit", "quote"]))
def test_a_prompt_that_asks_for_its_own_text_is_as_long_as_wanted(length: int, seed: int, workload: Workload) -> None:
    prompt = REQUESTED.make(random.Random(seed), length, workload)
    assert isinstance(prompt, list)
    assert len(prompt) == length
    if workload == "edit":
        assert prompt[-BEGUN_TOKENS:] == prompt[:BEGUN_TOKENS]
        assert prompt[-BEGUN_TOKENS - 2 : -BEGUN_TOKENS] == [7001, 7002]
    else:
        assert prompt[-1] == 7003


@pytest.mark.parametrize("workload", REQUESTS_BY_WORKLOAD)
def test_a_prompt_of_text_ends_with_what_it_asks_for(workload: Workload) -> None:
    prompt = Prompts(None, 4.0).make(random.Random(1), 200, workload)
    assert isinstance(prompt, str)
    assert len(prompt) == 800
    assert REQUESTS_BY_WORKLOAD[workload] in prompt[-120:]


def test_a_serve_point_names_its_workload_and_sends_it() -> None:
    (point,) = serve_points([2.0], "fixed", "100", "8", 4, "quote")
    assert point.name == "quote, 2 requests/s"
    assert all(request.prompt[-1] == 7003 for request in requests_of(point, REQUESTED, "1"))


def test_the_same_seed_sends_the_same_and_another_does_not() -> None:
    point = serve_points([2.0], "poisson", "64-256", "lognormal:64:0.7", 20)[0]
    first, again, other = (requests_of(point, PROMPTS, seed) for seed in ("1/a/0", "1/a/0", "1/a/1"))
    assert first == again
    assert first != other


def test_warm_up_is_as_wide_as_the_point_with_short_answers() -> None:
    point = batch_points([4], "128", "256", None)[0]
    warm_up = warmup_of(point, PROMPTS, "1")
    assert [(request.prompt_tokens, request.output_tokens) for request in warm_up] == [(128, 16)] * 4


def test_a_batch_has_enough_requests_to_be_full_most_of_the_time() -> None:
    assert [point.requests for point in batch_points([1, 2, 4, 8], "128", "128", None)] == [8, 8, 16, 32]
    assert batch_points([8], "128", "128", 5)[0].requests == 5


def test_context_is_filled_by_prompt_and_answer_together() -> None:
    point = context_points([2048], 64, None)[0]
    assert (point.prompt_tokens, point.output_tokens, point.concurrency) == ("1984", "64", 1)


def test_fixed_arrivals_are_evenly_spaced() -> None:
    assert arrival_times("fixed", 4.0, 5, random.Random(1)) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_have_the_rate_and_the_spread_of_chance() -> None:
    """The gaps of a Poisson process have a standard deviation as large as their mean."""
    times = arrival_times("poisson", 5.0, 5001, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)
    assert times[0] == 0.0


def test_what_a_server_cannot_do_is_skipped_with_the_numbers() -> None:
    server = Server(model="m", engine="sglang", context_length=4096, max_running_requests=4)
    long, wide = context_points([8192], 64, None)[0], batch_points([8], "128", "128", None)[0]
    assert reason_to_skip(long, server) == "needs a context of 8192 tokens, the server has 4096"
    assert reason_to_skip(wide, server) == "needs 8 requests at once, the server runs 4"
    assert reason_to_skip(context_points([4096], 64, None)[0], server) is None
    assert reason_to_skip(long, Server(model="m", engine="unknown")) is None


def test_shipped_text_is_the_one_whose_source_is_noted() -> None:
    readme = SHIPPED_TEXT.parent.joinpath("README.md").read_text()  # type: ignore[attr-defined]
    assert hashlib.sha256(shipped_text().encode()).hexdigest() in readme


def test_requests_carry_the_lengths_that_were_drawn() -> None:
    lengths = parse_lengths("--prompt-tokens", "10-20"), parse_lengths("--output-tokens", "5")
    requests = make_requests(PROMPTS, *lengths, 50, random.Random(1))
    assert all(len(request.prompt) == request.prompt_tokens for request in requests)
    assert {request.output_tokens for request in requests} == {5}
