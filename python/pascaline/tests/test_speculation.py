"""The settings of speculation: what each engine drafts, what it costs in the plan, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pascaline.cards import load_card
from pascaline.engines import engine_named
from pascaline.engines.llama_cpp import speculation as llama_cpp
from pascaline.engines.sglang import speculation as sglang
from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.errors import ConfigurationError
from pascaline.models.reader import read_model
from pascaline.models.resolve import builtin_model
from pascaline.models.spec import ModelSpec
from pascaline.planning import make_plan, table
from pascaline.planning.plan_text import explanation
from pascaline.planning.request import request_from_settings
from pascaline.plugin import PLUGIN
from pascaline.settings import Settings, contradictions

P4 = load_card("tesla-p4")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_model(builtin_model())


def settings(engine: str = "sglang", **speculative: Any) -> Settings:
    return Settings.model_validate({"engine": engine, "speculative": speculative, "context_length": 2048})


def planned(spec: ModelSpec, given: Settings, device: str = "cuda") -> Any:
    request = request_from_settings(given, spec, device=device, dtype="float16", card_bytes=8 * 2**30)
    return make_plan(spec, P4, request)


def with_heads(spec: ModelSpec) -> ModelSpec:
    """The model with a tensor that predicts further tokens."""
    head = replace(spec.tensors[-1], name="blk.30.nextn.eh_proj.weight")
    return replace(spec, tensors=(*spec.tensors, head))


def problems(given: Settings) -> list[tuple[str, str]]:
    return engine_named(given.engine).problems(given)


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
def test_a_model_that_answers_nothing_has_no_drafts(engine: str) -> None:
    given = Settings.model_validate({"engine": engine, "role": "embed", "speculative": {"method": "lookup"}})
    sentence = "'lookup' drafts tokens of answers, must be auto or none, as role is 'embed'"
    assert ("speculative.method", sentence) in contradictions(given)
    embedding = Settings.model_validate({"role": "embed"})
    assert sglang.speculation(embedding, device="cuda", n_bytes=2**33, columns=1) == NO_SPECULATION


class TestSglang:
    def test_lookup_has_the_rows_that_a_product_takes_at_once(self, spec: ModelSpec) -> None:
        """16 columns: activations of 16 bits are two each."""
        assert planned(spec, settings(method="lookup")).request.speculation == Speculation("lookup", 7, 8)
        eight = {"context_length": 2048, "activation_bits": {"decode": 8}, "speculative": {"method": "lookup"}}
        found = planned(spec, Settings.model_validate(eight)).request.speculation
        assert found == Speculation("lookup", 7, 16)

    @pytest.mark.parametrize(
        ("device", "n_bytes", "expected"),
        [("cuda", 2**30, "lookup"), ("cuda", 2**30 - 1, "none"), ("cpu", 2**33, "none")],
    )
    def test_auto_is_lookup_where_a_step_takes_longer_than_the_host(
        self, device: str, n_bytes: int, expected: str
    ) -> None:
        assert sglang.speculation(Settings(), device=device, n_bytes=n_bytes, columns=1).method == expected

    def test_none_is_none(self, spec: ModelSpec) -> None:
        plan = planned(spec, settings(method="none"))
        assert plan.request.speculation == NO_SPECULATION
        assert "--speculative-algorithm" not in plan.engine_args

    def test_the_flags_name_the_algorithm_and_the_rows_of_a_request(self, spec: ModelSpec) -> None:
        plan = planned(spec, settings(method="lookup", tokens=3))
        assert plan.engine_args[-4:] == (
            *("--speculative-algorithm", PLUGIN.lookup),
            *("--speculative-num-draft-tokens", "4"),
        )

    def test_more_tokens_than_rows_are_not_drafted(self, spec: ModelSpec) -> None:
        assert planned(spec, settings(method="lookup", tokens=15)).request.speculation.tokens == 7

    def test_auto_is_none_on_several_devices(self) -> None:
        given = Settings.model_validate({"tensor_parallel": 2})
        assert sglang.speculation(given, device="cuda", n_bytes=2**33, columns=1) == NO_SPECULATION
        assert problems(given) == []

    @pytest.mark.parametrize("method", ["draft", "eagle3", "mtp"])
    def test_what_is_not_built_is_refused_with_what_works(self, method: str) -> None:
        assert problems(settings(method=method)) == [
            (
                "speculative.method",
                f"{method!r} is not built for sglang, must be one of: auto, none, lookup; or set engine to llama.cpp, "
                "which has draft, eagle3 and mtp",
            )
        ]

    def test_lookup_on_several_devices_is_refused(self) -> None:
        given = Settings.model_validate({"speculative": {"method": "lookup"}, "pipeline_parallel": 2})
        assert problems(given) == [
            (
                "speculative.method",
                "'lookup' works on one device only, must be auto or none if tensor_parallel or pipeline_parallel is "
                "above 1",
            )
        ]

    def test_a_draft_model_that_nothing_uses_is_refused(self) -> None:
        assert problems(settings(draft_model="/m/small.gguf")) == [
            ("speculative.draft_model", "'/m/small.gguf' is used by llama.cpp only, must be left out")
        ]

    def test_the_variable_of_the_rows_is_the_plan_s(self) -> None:
        given = Settings.model_validate({"environment": {sglang.VARIABLE: "3"}})
        assert problems(given) == [
            (f"environment.{sglang.VARIABLE}", "is set by the plan, must be left out; set speculative.tokens")
        ]

    def test_the_plan_counts_slots_rows_and_recorded_steps(self, spec: ModelSpec) -> None:
        """Two steps of 8 slots for each of four requests, and one graph for each width and batch size in 8 rows."""
        without, plan = (planned(spec, settings(method=method)) for method in ("none", "lookup"))
        assert plan.kv_tokens - without.kv_tokens == 4 * 16
        parts = {part.key: part for part in plan.parts}
        assert parts["logits"].n_bytes == 8 * spec.vocab_size * 26 + 32 * spec.vocab_size * 4
        assert parts["graphs"].formula.startswith("11 recorded steps x ")
        assert plan.part("tables") - without.part("tables") == 5 * 8 * 4

    def test_the_least_pool_holds_a_request_and_its_drafts(self, spec: ModelSpec) -> None:
        given = settings(method="lookup")
        request = request_from_settings(given, spec, device="cuda", dtype="float16", card_bytes=2**28)
        assert make_plan(spec, P4, request).kv_tokens == 2048 + 16

    def test_the_speed_is_a_range_by_acceptance(self, spec: ModelSpec) -> None:
        plan = planned(spec, settings(method="lookup"))
        assert plan.speed.repeating.tokens_per_second > plan.speed.single.tokens_per_second
        low, high = (rate.tokens_per_second for rate in (plan.speed.single, plan.speed.repeating))
        line = f"  with lookup         {low:,.0f} to {high:,.0f} tok/s: no draft is right, or all 7 of each step are"
        assert line in table(plan).splitlines()
        assert "one request, every draft right: " in explanation(plan)
        assert planned(spec, settings(method="none")).speed.repeating is None

    def test_the_plan_says_it_in_json(self, spec: ModelSpec) -> None:
        found = planned(spec, settings(method="lookup")).to_json()["speculation"]
        assert found == {"method": "lookup", "tokens": 7, "rows": 8, "draft": None}


class TestLlamaCpp:
    def test_auto_is_none(self, spec: ModelSpec) -> None:
        assert planned(spec, settings("llama.cpp")).request.speculation == NO_SPECULATION

    @pytest.mark.parametrize(
        ("method", "flags"),
        [
            (
                "lookup",
                [
                    "--spec-type",
                    "ngram-simple",
                    *("--spec-ngram-simple-size-n", "4"),
                    *("--spec-ngram-simple-size-m", "15"),
                ],
            ),
            ("mtp", ["--spec-type", "draft-mtp", "--spec-draft-n-max", "3"]),
        ],
    )
    def test_its_own_flags(self, spec: ModelSpec, method: str, flags: list[str]) -> None:
        given = settings("llama.cpp", method=method)
        assert problems(given) == []
        assert llama_cpp.arguments(llama_cpp.speculation(given, with_heads(spec)), given) == flags

    @pytest.mark.parametrize(("method", "kind"), [("draft", "draft-simple"), ("eagle3", "draft-eagle3")])
    def test_a_draft_model_is_named_and_planned(self, spec: ModelSpec, method: str, kind: str) -> None:
        path = builtin_model()
        given = settings("llama.cpp", method=method, draft_model=str(path), tokens=5)
        plan = planned(spec, given)
        flags = ["--spec-type", kind, "--spec-draft-model", str(path), "--spec-draft-n-max", "5"]
        assert llama_cpp.arguments(plan.request.speculation, given) == flags
        without = planned(spec, settings("llama.cpp"))
        alike = without.part("weights") + without.part("kv_pool")
        assert plan.part("draft") > alike
        assert plan.total_bytes - without.total_bytes == plan.part("draft")
        assert plan.to_json()["speculation"]["draft"] == spec.name

    def test_heads_in_the_model_s_file_have_a_layer_of_kv_cache(self, spec: ModelSpec) -> None:
        plan = planned(with_heads(spec), settings("llama.cpp", method="mtp"))
        assert plan.part("draft") == plan.part("kv_pool") // spec.num_hidden_layers

    def test_a_model_without_heads_is_refused(self, spec: ModelSpec) -> None:
        with pytest.raises(ConfigurationError) as error:
            planned(spec, settings("llama.cpp", method="mtp"))
        assert str(error.value) == (
            f"speculative.method: 'mtp' needs heads that predict further tokens, and {spec.name} has no tensor with "
            "'.nextn.' in its name; choose a file with them, or one of: auto, none, lookup, draft, eagle3"
        )

    def test_another_vocabulary_is_refused(self, spec: ModelSpec) -> None:
        given = settings("llama.cpp", method="draft", draft_model=str(builtin_model()))
        other = replace(spec, vocab_size=spec.vocab_size + 129)
        with pytest.raises(ConfigurationError) as error:
            llama_cpp.speculation(given, other)
        assert str(error.value) == (
            f"speculative.draft_model: {builtin_model()} has a vocabulary of {spec.vocab_size:,} tokens, must be that of "
            f"the model ({spec.vocab_size + 129:,}); choose a smaller model of the same family"
        )

    def test_a_method_that_needs_a_model_says_so(self) -> None:
        assert problems(settings("llama.cpp", method="draft")) == [
            (
                "speculative.draft_model",
                "is missing, must be the GGUF file that speculative.method 'draft' drafts with",
            )
        ]

    @pytest.mark.parametrize("method", ["auto", "none", "lookup", "mtp"])
    def test_a_model_that_nothing_drafts_with_is_refused(self, method: str) -> None:
        given = settings("llama.cpp", method=method, draft_model=str(Path("/m/small.gguf")))
        sentence = f"'/m/small.gguf' is not used by speculative.method {method!r}, must be left out"
        assert problems(given) == [("speculative.draft_model", sentence)]
