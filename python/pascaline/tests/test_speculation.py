"""The settings of speculation: what each engine drafts, what it costs in the plan, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_acceptance import combined_sha256, file_sha256
from gguf_acceptance.vocabulary import difference
from pascaline.cards import load_card
from pascaline.engines import engine_named
from pascaline.engines.llama_cpp import speculation as llama_cpp
from pascaline.engines.sglang import engine as sglang_engine
from pascaline.engines.sglang import speculation as sglang
from pascaline.engines.sglang import vocabulary
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

    @pytest.mark.parametrize("method", ["eagle3", "mtp"])
    def test_what_is_not_available_is_refused_with_what_works(self, method: str) -> None:
        assert problems(settings(method=method)) == [
            (
                "speculative.method",
                f"{method!r} is not available for sglang, whose recorded steps keep no hidden states for heads to read; "
                "must be one of: auto, none, lookup, draft; or set engine to llama.cpp, which has eagle3 and mtp",
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

    @pytest.mark.parametrize("method", ["none", "lookup"])
    def test_a_draft_model_that_nothing_uses_is_refused(self, method: str) -> None:
        sentence = f"'/m/small.gguf' is not used by speculative.method {method!r}, must be left out"
        assert problems(settings(method=method, draft_model="/m/small.gguf")) == [("speculative.draft_model", sentence)]
        embedding = Settings.model_validate({"role": "embed", "speculative": {"draft_model": "/m/small.gguf"}})
        sentence = "'/m/small.gguf' is not used as role is 'embed', must be left out"
        assert ("speculative.draft_model", sentence) in problems(embedding)

    def test_drafting_without_a_draft_model_is_refused(self) -> None:
        sentence = "is missing, must be the GGUF file that speculative.method 'draft' drafts with"
        assert problems(settings(method="draft")) == [("speculative.draft_model", sentence)]

    @pytest.mark.parametrize("method", ["auto", "draft"])
    def test_a_draft_model_is_planned_and_named(self, spec: ModelSpec, method: str) -> None:
        """Its weights, keys and values in as many slots, and two recorded steps for each batch size."""
        given = settings(method=method, draft_model=str(builtin_model()))
        assert problems(given) == []
        lookup, plan = planned(spec, settings(method="lookup")), planned(spec, given)
        found = plan.request.speculation
        assert (found.method, found.tokens, found.rows) == ("draft", 7, 8)
        assert plan.engine_args[-6:] == (
            *("--speculative-algorithm", PLUGIN.draft, "--speculative-num-draft-tokens", "8"),
            *("--speculative-draft-model-path", str(builtin_model())),
        )
        assert plan.kv_tokens == lookup.kv_tokens
        tables = 8192 * spec.head_dim * 4 + 2 * 4 * spec.vocab_size * 4
        assert plan.part("draft") == pytest.approx(
            plan.part("weights") + plan.part("kv_pool") + plan.kv_tokens + 1 + tables, rel=0.01
        )
        assert plan.total_bytes - lookup.total_bytes == plan.part("draft") + plan.part("graphs") - lookup.part("graphs")
        graphs = next(part for part in plan.parts if part.key == "graphs")
        assert graphs.formula.startswith("19 recorded steps x ")
        assert "draft model" in explanation(plan)
        assert plan.to_json()["speculation"]["draft"] == spec.name

    def test_the_pool_leaves_room_for_the_draft_model(self, spec: ModelSpec) -> None:
        given = settings(draft_model=str(builtin_model()))
        whole = planned(spec, given)
        card_bytes = whole.total_bytes - whole.part("kv_pool")
        request = request_from_settings(given, spec, device="cuda", dtype="float16", card_bytes=card_bytes)
        plan = make_plan(spec, P4, request)
        assert plan.fits
        assert whole.kv_tokens / 3 < plan.kv_tokens < whole.kv_tokens * 2 / 3

    def test_a_prepared_folder_takes_the_place_of_the_draft_model_s_file(self, spec: ModelSpec) -> None:
        found = Speculation("draft", 3, 8, draft=spec, draft_dir=Path("/cache/draft"))
        assert sglang.arguments(found)[-1] == "/cache/draft"

    def test_the_engine_prepares_the_draft_model_s_file(
        self, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(sglang_engine, "prepare", lambda _settings, path, digest: tmp_path / path.name / digest)
        given = Settings()
        found = engine_named("sglang").prepare_draft(given, Speculation("draft", 3, 8, draft=spec))
        digest = combined_sha256([file_sha256(builtin_model())])
        assert found.draft_dir == tmp_path / builtin_model().name / digest
        assert engine_named("sglang").prepare_draft(given, NO_SPECULATION) is NO_SPECULATION

    def test_a_draft_model_makes_drafts_dearer(self, spec: ModelSpec) -> None:
        """Seven reads of a model as large as the model itself."""
        lookup, draft = (
            planned(spec, settings(**given)).speed.repeating.tokens_per_second
            for given in ({"method": "lookup"}, {"draft_model": str(builtin_model())})
        )
        assert draft < lookup

    def test_a_draft_model_with_another_tokenizer_is_refused(
        self, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = vocabulary._values(builtin_model())
        tokens = own["tokenizer.ggml.tokens"]
        other = {**own, "tokenizer.ggml.tokens": [*tokens[:77], "other", *tokens[78:]]}
        monkeypatch.setattr(vocabulary, "_difference", lambda *_: difference(own, other))
        with pytest.raises(ConfigurationError) as error:
            planned(spec, settings(method="draft", draft_model=str(builtin_model())))
        assert str(error.value) == (
            f"speculative.draft_model: {builtin_model()} has another tokenizer than the model: token 77 is 'other', the "
            f"model's is {tokens[77]!r}; choose a smaller model of the same family"
        )

    def test_a_draft_model_on_several_devices_is_refused(self) -> None:
        given = {"speculative": {"draft_model": "/m/small.gguf"}, "pipeline_parallel": 2}
        assert [key for key, _ in problems(Settings.model_validate(given))] == ["speculative.draft_model"]

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
