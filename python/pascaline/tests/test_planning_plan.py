"""The plan keeps its promises: it grows with what is asked for, never exceeds the card, and says why it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pascaline.cards import Card, card_names, load_card, unknown_card
from pascaline.configuration import load
from pascaline.engines import ENGINES, Task
from pascaline.errors import ConfigurationError
from pascaline.gpu.memory import GpuRates
from pascaline.models.resolve import ResolvedModel
from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.planning import PlanRequest, make_plan, nearest_fits, other_engine_fits, request_from_settings
from pascaline.planning.mixtures import MIXTURES, requantized
from pascaline.planning.nearest import longest_context
from pascaline.planning.plan import SHORTEST_CONTEXT
from pascaline.planning.plan_text import table
from pascaline.settings import Settings
from support.planning import LLAMA_2_7B, LLAMA_3_8B, P4, QWEN_3_4B, request

SGLANG = ENGINES["sglang"].memory
GPUS = [name for name in card_names() if name != "cpu"]
SPECS = {"llama-2-7b": LLAMA_2_7B, "llama-3.1-8b": LLAMA_3_8B, "qwen3-4b": QWEN_3_4B}
EXAMPLES = settings.default.max_examples
"""Of a property test that names no number: 100, fewer in the fast run."""
FILES = {(name, mixture): requantized(spec, mixture) for name, spec in SPECS.items() for mixture in MIXTURES}


class Case(NamedTuple):
    """Names rather than models, so that a failing case can be printed."""

    file: tuple[str, str]
    card_name: str
    wanted: PlanRequest

    @property
    def target(self) -> tuple[ModelSpec, Card, PlanRequest]:
        return FILES[self.file], load_card(self.card_name), self.wanted


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any file on any card with any settings."""
    name = draw(st.sampled_from(GPUS))
    card = load_card(name)
    file = draw(st.sampled_from(sorted(FILES)))
    engine = draw(st.sampled_from(["sglang", "llama.cpp"]))
    wanted = request(
        card,
        engine=engine,
        context_length=draw(st.integers(16, 1 << 17)),
        max_running_requests=draw(st.integers(1, 64)),
        kv_dtype=draw(st.sampled_from([kind for kind in ENGINES[engine].memory.kv_types if kind != "fp32"])),
        chunked_prefill_tokens=draw(st.integers(16, 8192)),
        mem_fraction_static=draw(st.one_of(st.none(), st.floats(0.1, 0.99))),
        max_total_tokens=draw(st.one_of(st.none(), st.integers(1, 1 << 18))),
        used_bytes=draw(st.integers(0, min(4 << 30, card.memory_bytes))),
    )
    return Case(file, name, wanted)


class TestPromises:
    @given(cases())
    @settings(max_examples=EXAMPLES * 3)
    def test_what_it_accepts_never_exceeds_the_card(self, case: Case) -> None:
        spec, card, wanted = case.target
        plan = make_plan(spec, card, wanted)
        if plan.fits:
            assert plan.total_bytes + wanted.used_bytes <= plan.card_bytes
            assert plan.kv_tokens >= plan.context_length
        assert plan.total_bytes == sum(part.n_bytes for part in plan.parts)
        assert plan.headroom_bytes == plan.card_bytes - wanted.used_bytes - plan.total_bytes

    @given(cases(), st.integers(1, 1 << 15), st.integers(1, 32))
    @settings(max_examples=EXAMPLES * 2)
    def test_more_context_or_requests_never_take_less(self, case: Case, tokens: int, more: int) -> None:
        """A pool without a configured size may only shrink for what the engine needs beside it: one token's rounding."""
        spec, card, wanted = case.target
        plan = make_plan(spec, card, wanted)
        longer = make_plan(spec, card, replace(wanted, context_length=wanted.context_length + tokens))
        wider = make_plan(spec, card, replace(wanted, max_running_requests=wanted.max_running_requests + more))
        for larger in (longer, wider):
            assert larger.total_bytes >= plan.total_bytes - plan.kv_bytes_per_token

    @given(cases(), st.integers(1, 1 << 15))
    @settings(max_examples=EXAMPLES * 2)
    def test_what_does_not_fit_fits_with_no_larger_context(self, case: Case, tokens: int) -> None:
        spec, card, wanted = case.target
        larger = replace(wanted, context_length=wanted.context_length + tokens)
        if make_plan(spec, card, larger).fits:
            assert make_plan(spec, card, wanted).fits

    @pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
    @pytest.mark.parametrize("name", sorted(SPECS))
    def test_weights_shrink_with_the_bits_of_a_file(self, name: str, engine: str) -> None:
        """For types that the engine holds unchanged: SGLang's plugin holds Q3_K as Q6_K."""
        mixtures = [mixture for mixture in MIXTURES if engine == "llama.cpp" or not mixture.startswith("Q3")]
        sizes = [make_plan(FILES[name, mixture], P4, request(engine=engine)).weights_bytes for mixture in mixtures]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)

    @given(cases())
    @settings(max_examples=EXAMPLES * 3 // 5)  # a fit takes a tenth of a second
    def test_the_nearest_fit(self, case: Case) -> None:
        """Every change that is offered fits, and no two are the same."""
        spec, card, wanted = case.target
        changes = nearest_fits(spec, card, wanted)
        assert all(change.plan.fits for change in changes)
        assert len(changes) <= 3
        assert len({str(change.settings) for change in changes}) == len(changes)

    @given(cases())
    @settings(max_examples=EXAMPLES * 3 // 5)
    def test_the_longest_context_is_the_longest(self, case: Case) -> None:
        spec, card, wanted = case.target
        longest = longest_context(spec, card, wanted)
        most = max(spec.context_length, wanted.context_length)
        if longest is not None:
            assert make_plan(spec, card, replace(wanted, context_length=longest)).fits
            further = replace(wanted, context_length=longest + 256)
            assert longest + 256 > most or not make_plan(spec, card, further).fits


class TestOddModels:
    """Headers may say anything; there is a plan nevertheless."""

    @given(
        st.integers(0, 5), st.integers(0, 3), st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 4),
        st.sampled_from(["sglang", "llama.cpp"]), st.sampled_from(["tesla-p4", "tesla-p100", "cpu"]), st.booleans(),
    )  # fmt: skip
    @settings(max_examples=EXAMPLES * 2)
    def test_no_number_breaks_it(
        self, layers: int, heads: int, size: int, vocabulary: int, experts: int, engine: str, card: str, empty: bool
    ) -> None:
        spec = replace(
            QWEN_3_4B, num_hidden_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=size, v_head_dim=size,
            hidden_size=size, intermediate_size=size, vocab_size=vocabulary, context_length=size, num_experts=experts,
            num_experts_per_token=1, tensors=() if empty else QWEN_3_4B.tensors[:3],
        )  # fmt: skip
        profile = load_card(card)
        wanted = request(profile, card_bytes=8 << 30, engine=engine, device="cpu" if card == "cpu" else "cuda")
        plan = make_plan(spec, profile, wanted)
        assert plan.to_json()["fits"] == plan.fits
        nearest_fits(spec, profile, replace(wanted, context_length=1 << 22))


class TestGuidesExample:
    """The guide's own case: a 7B model in Q4_K_M on 8 GB, 4 requests, context 4096."""

    def test_64_mib_of_kv_cache_hold_128_tokens(self) -> None:
        plan = make_plan(LLAMA_2_7B, P4, request(max_kv_bytes=64 << 20, mem_fraction_static=0.9))
        assert plan.reasons == (
            "kv_cache.max_bytes: 64.00 MiB holds 128 tokens of this model (512.00 KiB each) and cannot serve a "
            "4,096-token request: set at least 2.00 GiB, or context_length to 127, or take a smaller kv_cache.dtype or "
            "a model with fewer KV heads",
        )

    def test_a_pool_of_nothing_offers_no_context_of_nothing(self) -> None:
        """The shortest context that can be set is the least that is offered."""
        shortest = next(rule.ge for rule in Settings.model_fields["context_length"].metadata if hasattr(rule, "ge"))
        assert shortest == SHORTEST_CONTEXT
        for tokens, offers in ((shortest, False), (shortest + 1, True)):
            plan = make_plan(LLAMA_2_7B, P4, request(max_kv_bytes=tokens * 524288))
            assert ("or context_length to 16," in plan.reasons[0]) is offers
        assert make_plan(LLAMA_2_7B, P4, request(max_kv_bytes=64)).reasons == (
            "kv_cache.max_bytes: 64 B holds 0 tokens of this model (512.00 KiB each) and cannot serve a "
            "4,096-token request: set at least 2.00 GiB, or take a smaller kv_cache.dtype or a model with fewer KV heads",
        )

    def test_it_fits_with_a_pool_for_one_whole_request(self) -> None:
        plan = make_plan(LLAMA_2_7B, P4, request(mem_fraction_static=0.9))
        assert plan.fits
        assert plan.weights_bytes == 4_079_730_688
        assert plan.kv_bytes_per_token == 2 * 32 * 32 * 128 * 2
        assert plan.kv_bytes == (plan.kv_tokens + 1) * plan.kv_bytes_per_token
        assert 4096 <= plan.kv_tokens < 4 * 4096
        assert plan.notes == (
            f"the KV cache holds {plan.kv_tokens:,} tokens: 4 requests at once have {plan.kv_tokens // 4:,} each, one "
            "alone has 4,096; longer ones wait",
        )

    def test_llama_cpp_would_need_room_for_all_four(self) -> None:
        plan = make_plan(LLAMA_2_7B, P4, request(engine="llama.cpp"))
        assert plan.kv_bytes == 4 * 4096 * 524288
        assert plan.reasons == ("it needs 12.04 GiB, the card has 7.43 GiB: 4.61 GiB too much",)

    def test_the_nearest_that_fit(self) -> None:
        changes = nearest_fits(LLAMA_2_7B, P4, request(max_kv_bytes=64 << 20, mem_fraction_static=0.9))
        assert [sorted(change.settings) for change in changes] == [
            ["kv_cache.max_bytes"],
            ["kv_cache.max_tokens"],
            ["kv_cache.max_tokens", "mem_fraction_static"],
        ]
        assert changes[0].settings["kv_cache.max_bytes"] == 2049 << 20

    def test_another_process_on_the_card(self) -> None:
        plan = make_plan(LLAMA_2_7B, P4, request(used_bytes=2 << 30))
        missing = plan.total_bytes - plan.request.available_bytes
        assert plan.reasons == (
            "it needs 6.68 GiB, the card has 7.43 GiB, of which others use 2.00 GiB: "
            f"{missing / 2**30:.2f} GiB too much",
        )


class TestMemoryFraction:
    def test_what_is_set_bounds_weights_and_pool(self) -> None:
        plan = make_plan(LLAMA_3_8B, P4, request(mem_fraction_static=0.5))
        assert plan.mem_fraction_static == 0.5
        assert plan.reasons[0].startswith("mem_fraction_static: 0.5 leaves 3.57 GiB for weights and KV cache, ")

    def test_what_is_not_set_leaves_the_pool_its_room(self) -> None:
        """SGLang's pool gets free memory less (1 - fraction) of what was free before the model was loaded."""
        plan = make_plan(LLAMA_3_8B, P4, request(max_total_tokens=8192))
        base = plan.card_bytes - plan.part("context")
        before = plan.part("weights") + plan.part("tables") + plan.part("rounding")
        assert plan.mem_fraction_static is not None
        assert base - before - (1 - plan.mem_fraction_static) * base >= plan.kv_bytes

    def test_llama_cpp_has_none(self) -> None:
        assert make_plan(QWEN_3_4B, P4, request(engine="llama.cpp")).mem_fraction_static is None


class TestEngines:
    @pytest.mark.parametrize("kv_dtype", SGLANG.kv_types)
    def test_the_flags_are_those_that_sglang_is_started_with(self, kv_dtype: str, tmp_path: Path) -> None:
        wanted = {"fp32": "auto", "bf16": "bf16"}.get(kv_dtype, kv_dtype)
        dtype = {"fp32": "float32"}.get(kv_dtype, "float16")
        command, flags = _commands(tmp_path, "sglang", wanted, dtype)
        assert _pairs(flags) <= _pairs(command)

    @pytest.mark.parametrize("kv_dtype", ENGINES["llama.cpp"].memory.kv_types)
    def test_the_flags_are_those_that_llama_cpp_is_started_with(self, kv_dtype: str, tmp_path: Path) -> None:
        command, flags = _commands(tmp_path, "llama.cpp", kv_dtype, "float16")
        assert _pairs(flags) <= _pairs(command)

    def test_a_kv_type_that_the_engine_lacks(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            make_plan(LLAMA_3_8B, P4, request(engine="llama.cpp", kv_dtype="fp8_e5m2"))
        assert str(caught.value) == ("kv_cache.dtype: llama.cpp has no 'fp8_e5m2', must be one of: fp16, bf16, int8")

    def test_a_type_without_kernels_is_noted_with_what_it_costs(self) -> None:
        tensors = (TensorSpec("token_embd.weight", (1024, 4096), "IQ4_XS", 1024 * 4096 // 256 * 136),)
        plan = make_plan(replace(QWEN_3_4B, tensors=tensors, tied_embeddings=True), P4, request())
        assert plan.notes[-1] == (
            "IQ4_XS has no kernels here and is held as float16: 8.00 MiB on the card for 2.12 MiB in the file; quantise "
            "the model to Q4_K_M or Q8_0, or take engine llama.cpp, which computes with IQ4_XS as it is"
        )
        assert not any("IQ4_XS" in note for note in make_plan(QWEN_3_4B, P4, request(engine="llama.cpp")).notes)


class TestOtherEngine:
    def test_an_engine_that_fits_is_named_beside_the_nearest_settings(self) -> None:
        """On a CPU SGLang widens the weights of a 7B to 27 GB; llama.cpp computes with the 4 GB of the file."""
        cpu = load_card("cpu")
        asked = request(cpu, card_bytes=16 << 30, device="cpu", dtype="float32", kv_dtype="fp32")
        assert not make_plan(LLAMA_2_7B, cpu, asked).fits
        [change] = other_engine_fits(Settings(device="cpu", context_length=4096), LLAMA_2_7B, cpu, asked)
        assert change.settings == {"engine": "llama.cpp"}
        assert change.sentence.startswith("engine llama.cpp: 16,384 tokens of KV cache, ")

    @pytest.mark.parametrize(
        ("spec", "settings"),
        [(replace(LLAMA_2_7B, format="safetensors"), {}), (LLAMA_2_7B, {"attention_backend": "pascal"})],
        ids=["a model that it cannot read", "a setting that it lacks"],
    )
    def test_an_engine_that_would_refuse_to_start_is_not_named(self, spec: ModelSpec, settings: dict[str, Any]) -> None:
        cpu = load_card("cpu")
        asked = request(cpu, card_bytes=16 << 30, device="cpu", dtype="float32", kv_dtype="fp32")
        given = Settings(device="cpu", context_length=4096, **settings)
        assert other_engine_fits(given, spec, cpu, asked) == []

    def test_an_engine_that_does_not_fit_either_is_not_named(self) -> None:
        asked = request(P4, card_bytes=2 << 30)
        assert other_engine_fits(Settings(context_length=4096), LLAMA_2_7B, P4, asked) == []


class TestCards:
    @pytest.mark.parametrize("name", GPUS)
    def test_a_small_model_fits_every_card_that_has_room_for_it(self, name: str) -> None:
        """2.5 GB of weights and 0.6 GB for one request: cards of 2 and 3 GB refuse it, all others take it."""
        card = load_card(name)
        plan = make_plan(QWEN_3_4B, card, request(card))
        assert plan.fits == (card.memory_bytes > 3.5 * 2**30)
        assert plan.speed is not None

    def test_a_card_without_a_profile_has_a_plan_but_no_speed(self) -> None:
        card = unknown_card("Quadro P3000", 6 << 30)
        plan = make_plan(QWEN_3_4B, card, request(card))
        assert plan.fits
        assert plan.card == "Quadro P3000"
        assert plan.speed is None

    def test_a_card_without_a_profile_has_the_speed_of_its_own_rates_as_an_estimate(self) -> None:
        """A P4 under another name: the profile's own figures, without a measured basis."""
        rates = GpuRates(P4.number("bandwidth_bytes_per_second"), 2560, P4.number("boost_clock_hertz"), "6.1")
        card = unknown_card("Tesla P4X", P4.memory_bytes, rates)
        for engine in ("sglang", "llama.cpp"):
            ours = make_plan(QWEN_3_4B, card, request(engine=engine)).speed
            profile = make_plan(QWEN_3_4B, P4, request(engine=engine)).speed
            assert ours is not None
            assert profile is not None
            assert ours.single.tokens_per_second == profile.single.tokens_per_second
            assert ours.basis == "estimated"

    def test_on_the_cpu_weights_are_in_the_type_of_the_computation(self) -> None:
        card = load_card("cpu")
        wanted = PlanRequest(card_bytes=64 << 30, device="cpu", dtype="float32", kv_dtype="fp32", context_length=2048)
        plan = make_plan(QWEN_3_4B, card, wanted)
        assert plan.weights_bytes == 4 * QWEN_3_4B.n_parameters
        assert plan.part("process") > 0
        assert plan.part("context") == 0

    def test_a_pool_on_the_cpu_that_nobody_gave_a_size_is_small(self) -> None:
        card = load_card("cpu")
        wanted = PlanRequest(card_bytes=64 << 30, device="cpu", context_length=1024, max_running_requests=64)
        assert make_plan(LLAMA_2_7B, card, wanted).kv_bytes <= 1 << 30


class TestActivationBits:
    """8 bits if they save time and do not change answers, otherwise 16; a chosen number is kept."""

    @staticmethod
    def bits(spec: ModelSpec, device: str = "cuda", **flags: Any) -> tuple[int | None, int | None]:
        settings = load(flags, environment={}, check_host=False).settings
        return ENGINES[settings.engine].memory.activation_bits(settings, spec, device=device)

    def test_a_large_model_has_8_bits_in_prompts_and_16_while_they_cost_little(self) -> None:
        assert self.bits(QWEN_3_4B, max_running_requests=4) == (8, 16)
        assert self.bits(QWEN_3_4B, max_running_requests=6) == (8, 16)
        assert self.bits(QWEN_3_4B, max_running_requests=7) == (8, 8)

    def test_a_small_model_and_a_cpu_have_16(self) -> None:
        assert self.bits(replace(QWEN_3_4B, hidden_size=2047), max_running_requests=32) == (16, 16)
        assert self.bits(QWEN_3_4B, device="cpu", max_running_requests=32) == (16, 16)

    def test_what_was_chosen_is_kept(self) -> None:
        assert self.bits(QWEN_3_4B, **{"activation_bits.prefill": 16, "activation_bits.decode": "8"}) == (16, 8)

    def test_where_there_is_no_choice_there_are_none(self) -> None:
        folder = replace(QWEN_3_4B, format="safetensors")
        assert self.bits(folder) == self.bits(QWEN_3_4B, engine="llama.cpp") == (None, None)
        with pytest.raises(ConfigurationError) as caught:
            self.bits(folder, **{"activation_bits.decode": 16})
        assert str(caught.value) == (
            "activation_bits.decode: 16 applies to a GGUF file's weights, but the model's are safetensors; leave it out"
        )

    def test_prompts_in_8_bits_are_expected_to_be_faster(self) -> None:
        plans = [make_plan(QWEN_3_4B, P4, request(prefill_bits=bits, decode_bits=16)) for bits in (8, 16)]
        fast, slow = (plan.speed for plan in plans)
        assert fast is not None
        assert slow is not None
        assert fast.prefill.tokens_per_second > 1.5 * slow.prefill.tokens_per_second
        assert fast.decode == slow.decode
        assert plans[0].to_json()["activation_bits"] == {"prefill": 8, "decode": 16}
        assert table(plans[0]).splitlines()[0].endswith(", 8-bit prompts, 16-bit decode")


class TestRequestFromSettings:
    def test_auto_is_the_type_of_the_computation(self) -> None:
        configuration = load({"card": "cpu"}, environment={}, check_host=False)
        made = request_from_settings(
            configuration.settings, QWEN_3_4B, device="cpu", dtype="bfloat16", card_bytes=1 << 30, used_bytes=5
        )
        assert (made.kv_dtype, made.context_length, made.used_bytes) == ("bf16", QWEN_3_4B.context_length, 5)

    def test_a_model_that_names_no_context_needs_one(self) -> None:
        configuration = load({"card": "cpu"}, environment={}, check_host=False)
        with pytest.raises(ConfigurationError) as caught:
            request_from_settings(
                configuration.settings,
                replace(QWEN_3_4B, context_length=0),
                device="cpu",
                dtype="float32",
                card_bytes=1,
            )
        assert str(caught.value) == "context_length: the model names none, must be set to the tokens of a request"

    @pytest.mark.parametrize(
        ("method", "model", "message"),
        [
            (
                "bitsandbytes",
                "gguf",
                "'bitsandbytes' applies to a Hugging Face folder's weights, but the model's are gguf",
            ),
            ("gguf", "safetensors", "'gguf' applies to a GGUF file's weights, but the model's are safetensors"),
        ],
    )
    def test_a_quantisation_of_another_format(self, method: str, model: str, message: str) -> None:
        """SGLang would find out only while it loads."""
        configuration = load({"card": "tesla-p4", "quantization": method}, environment={}, check_host=False)
        spec = replace(QWEN_3_4B, format=model)
        with pytest.raises(ConfigurationError) as caught:
            request_from_settings(configuration.settings, spec, device="cuda", dtype="float16", card_bytes=1)
        assert str(caught.value) == f"quantization: {message}; leave it out"

    def test_sglang_has_no_fp16_pool_beside_another_computation(self) -> None:
        configuration = load({"card": "cpu", "kv_cache.dtype": "fp16"}, environment={}, check_host=False)
        made = request_from_settings(configuration.settings, QWEN_3_4B, device="cpu", dtype="float32", card_bytes=1)
        assert made.kv_dtype == "fp32"


def test_json_has_what_is_promised() -> None:
    plan = make_plan(LLAMA_2_7B, P4, request())
    document = plan.to_json()
    promised = {"fits", "weights_bytes", "kv_bytes_per_token", "kv_tokens", "kv_bytes", "total_bytes", "card_bytes"}
    promised |= {"parts", "engine_args", "tokens_per_second", "weights_read_bytes", "matrix_read_bytes"}
    assert promised <= set(document)
    assert document["total_bytes"] == sum(part["bytes"] for part in document["parts"])


def _commands(folder: Path, engine: str, kv_dtype: str, dtype: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The command that an engine is started with, and the flags of the plan for the same settings."""
    program = folder / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    flags = {"engine": engine, "kv_cache.dtype": kv_dtype, "context_length": 2048, "card": "tesla-p4"}
    extra = {"engine_executable": program} if engine == "llama.cpp" else {}
    configuration = load(flags | extra, environment={}, check_host=False)
    values = configuration.settings
    made = request_from_settings(values, QWEN_3_4B, device="cuda", dtype=dtype, card_bytes=P4.memory_bytes)
    plan = make_plan(QWEN_3_4B, P4, made)
    task = Task(
        settings=values, model=ResolvedModel("gguf", Path("m.gguf"), QWEN_3_4B, "m"), device="cuda", dtype=dtype,
        threads=1, context_length=plan.context_length, max_total_tokens=plan.kv_tokens,
        mem_fraction_static=plan.mem_fraction_static, prefill_bits=made.prefill_bits or 16,
        decode_bits=made.decode_bits or 16, speculation=made.speculation,
        runtime_dir=folder,
    )  # fmt: skip
    return ENGINES[engine].launch(task).command, plan.engine_args


def _pairs(arguments: tuple[str, ...]) -> set[tuple[str, str]]:
    return {
        (flag, value) for flag, value in pairwise(arguments) if flag.startswith("--") and not value.startswith("--")
    }
