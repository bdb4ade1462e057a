"""Sweeps and the search for the best settings: what is offered fits, and nothing that is left out beats it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pascaline.cards import load_card, unknown_card
from pascaline.planning import make_plan, nearest_fits
from pascaline.planning.mixtures import MIXTURES, PERPLEXITY_LOSS, requantized
from pascaline.planning.search import REQUESTS, Choice, Goal, optimize, sweep
from support.models import SHAPES
from support.planning import LLAMA_2_7B, LLAMA_3_8B, P4, QWEN_3_4B, request, spec_of

GOALS: tuple[Goal, ...] = ("throughput", "latency", "context")
MAX_LOSS = PERPLEXITY_LOSS["Q4_K_M"] + 0.02


def scores(choice: Choice, goal: Goal) -> tuple[float, float, float]:
    """What is weighed against each other, larger is better, the goal first."""
    context, quality = choice.plan.context_length, -choice.loss
    if goal == "context":
        return context, choice.throughput, quality
    return (-choice.latency_seconds if goal == "latency" else choice.throughput), context, quality


class TestOptimize:
    @pytest.mark.parametrize("goal", GOALS)
    @pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
    def test_what_it_offers_fits_with_room_for_every_request(self, goal: Goal, engine: str) -> None:
        for choice in optimize(LLAMA_3_8B, P4, request(engine=engine), goal, MAX_LOSS):
            plan = choice.plan
            assert plan.fits
            assert plan.kv_tokens >= plan.context_length * plan.request.max_running_requests
            assert choice.loss <= MAX_LOSS

    @pytest.mark.parametrize("goal", GOALS)
    def test_the_first_is_the_best_and_none_beats_another(self, goal: Goal) -> None:
        choices = optimize(LLAMA_3_8B, P4, request(), goal, MAX_LOSS)
        assert scores(choices[0], goal)[0] == max(scores(choice, goal)[0] for choice in choices)
        for one in choices:
            for other in choices:
                pairs = zip(scores(other, goal), scores(one, goal), strict=True)
                assert not all(better > worse for better, worse in pairs)

    def test_a_larger_card_is_never_worse(self) -> None:
        p40 = load_card("tesla-p40")
        small = optimize(LLAMA_3_8B, P4, request(), "throughput", MAX_LOSS)
        large = optimize(LLAMA_3_8B, p40, request(p40), "throughput", MAX_LOSS)
        assert large[0].throughput > small[0].throughput

    def test_a_stricter_quality_leaves_the_better_files(self) -> None:
        strict = optimize(LLAMA_3_8B, P4, request(), "throughput", PERPLEXITY_LOSS["Q6_K"] + 0.02)
        assert {choice.file_type for choice in strict} <= {"F16", "Q8_0", "Q6_K"}

    def test_nothing_fits(self) -> None:
        assert optimize(spec_of(SHAPES["llama-3.1-8b"]), P4, request(used_bytes=7 << 30), "latency", 9.0) == []

    def test_the_longest_context_needs_no_speed(self) -> None:
        """A GPU without a profile: what cannot be known is absent, in JSON too."""
        card = unknown_card("NVIDIA T1000", 8 << 30)
        choices = optimize(LLAMA_3_8B, card, request(card), "context", MAX_LOSS)
        assert choices[0].plan.context_length == max(choice.plan.context_length for choice in choices) > 4096
        found = choices[0].to_json()
        assert (found["tokens_per_second"], found["latency_seconds"]) == (None, None)

    def test_throughput_keeps_the_context_that_was_asked_for(self) -> None:
        for choice in optimize(QWEN_3_4B, P4, request(context_length=8192), "throughput", MAX_LOSS):
            assert choice.plan.context_length >= 8192


class TestSweep:
    def test_contexts_grow_to_the_models(self) -> None:
        plans = sweep(LLAMA_2_7B, P4, request(context_length=3000), "context")
        assert [plan.context_length for plan in plans] == [1024, 2048, 3000, 4096]

    def test_requests(self) -> None:
        plans = sweep(LLAMA_2_7B, P4, request(), "requests")
        assert [plan.request.max_running_requests for plan in plans] == list(REQUESTS)

    def test_quantisations(self) -> None:
        plans = sweep(LLAMA_2_7B, P4, request(), "quant")
        assert [plan.model for plan in plans] == list(MIXTURES)
        by_name = {plan.model: plan for plan in plans}
        assert by_name["Q4_K_M"].weights_bytes == make_plan(LLAMA_2_7B, P4, request()).weights_bytes
        assert not by_name["F16"].fits


class TestNearest:
    def test_a_model_that_is_too_large_is_offered_smaller(self) -> None:
        changes = nearest_fits(requantized(LLAMA_3_8B, "Q8_0"), P4, request())
        assert changes[0].settings == {"file_type": "Q5_K_M"}
        assert changes[0].sentence == (
            f"the model quantised to Q5_K_M: {changes[0].plan.kv_tokens:,} tokens of KV cache, "
            f"{changes[0].plan.headroom_bytes / 2**20:,.0f} MiB to spare"
        )

    def test_a_context_that_is_too_long_is_offered_shorter_or_smaller_values(self) -> None:
        changes = nearest_fits(LLAMA_3_8B, P4, request(context_length=32768))
        keys = [set(change.settings) for change in changes]
        assert {"context_length"} in keys
        assert {"kv_cache.dtype", "context_length"} in keys or {"kv_cache.dtype"} in keys

    def test_llama_cpp_may_take_fewer_requests(self) -> None:
        changes = nearest_fits(LLAMA_2_7B, P4, request(engine="llama.cpp"))
        assert {"max_running_requests"} in [set(change.settings) for change in changes]

    def test_nothing_fits(self) -> None:
        assert nearest_fits(LLAMA_3_8B, P4, request(used_bytes=7 << 30)) == []

    def test_what_fits_needs_no_change_of_the_file(self) -> None:
        changes = nearest_fits(LLAMA_2_7B, P4, replace(request(), max_total_tokens=100))
        assert all("file_type" not in change.settings for change in changes)
