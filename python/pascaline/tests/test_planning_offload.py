"""Experts and layers in the host's memory: sizes as llama-server's log has them, and the choice of what goes there."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.cards import load_card, unknown_card
from pascaline.configuration import load
from pascaline.engines import ENGINES, Task
from pascaline.engines.llama_cpp.locking import check_limit
from pascaline.engines.llama_cpp.options import host_cache_arguments, mapped_arguments, numa_arguments
from pascaline.engines.llama_cpp.pool import kernel_pool, most_blocks
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.errors import ConfigurationError
from pascaline.gpu.memory import GpuRates
from pascaline.models.resolve import ResolvedModel
from pascaline.planning import make_plan, nearest_fits
from pascaline.planning.catalog import catalog_spec, shapes
from pascaline.planning.hints import with_hints
from pascaline.planning.plan_text import choices_table, explanation, rate_digits, refusal, sweep_table, table
from pascaline.planning.request import request_from_settings
from pascaline.planning.search import optimize
from pascaline.settings import Settings
from support.mixtures import QWEN_3_30B_A3B, SMALL_MIXTRAL, mixture_spec
from support.planning import LLAMA_2_7B, LLAMA_3_8B, request

if TYPE_CHECKING:
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec
    from pascaline.planning import Plan

MIB = 2**20
QWEN, MIXTRAL = mixture_spec(QWEN_3_30B_A3B), mixture_spec(SMALL_MIXTRAL)
P4, P40 = load_card("tesla-p4"), load_card("tesla-p40")


def offloading(**changes: Any) -> PlanRequest:
    """One request of 4096 tokens by llama.cpp on a P4; what is on the host is left to the plan."""
    values: dict[str, Any] = {"max_running_requests": 1, "expert_layers_on_host": None} | changes
    return request(P4, engine="llama.cpp", **values)


def host_part(plan: Plan, key: str) -> int:
    return sum(part.n_bytes for part in plan.host_parts if part.key == key)


class TestAgainstTheLog:
    """Lines of a llama-server that loaded such files on a GPU, `-c 4096 -np 1 -ub 512 -fa on`, in MiB.

    2026-11-29, llama.cpp 0.5.0-dev as code for compute capability 6.1 on an H200.
    """

    @pytest.mark.parametrize(
        ("layers", "device", "host", "compute"),
        [(0, 17524.43, 166.92, 88.01), (24, 9154.43, 8536.92, 221.51), (48, 784.42, 16906.92, 221.51)],
    )
    def test_qwen_3_30b_a3b(self, layers: int, device: float, host: float, compute: float) -> None:
        plan = make_plan(QWEN, P40, offloading(card_bytes=P40.memory_bytes, expert_layers_on_host=layers))
        assert round(plan.weights_bytes / MIB, 2) == device
        assert round(host_part(plan, "host_weights") / MIB, 2) == host
        assert plan.kv_bytes == 384 * MIB
        assert compute <= round(plan.part("activations") / MIB, 2) < 1.4 * compute

    def test_buffers_on_the_host(self) -> None:
        plan = make_plan(QWEN, P40, offloading(expert_layers_on_host=48))
        assert round(host_part(plan, "host_output") / MIB, 2) == 0.58
        assert 12.01 <= host_part(plan, "host_compute") / MIB <= 13.1

    def test_longer_contexts_need_a_larger_mask_on_both_sides(self) -> None:
        short = make_plan(QWEN, P40, offloading(expert_layers_on_host=48))
        long = make_plan(QWEN, P40, offloading(expert_layers_on_host=48, context_length=32768))
        assert long.part("activations") - short.part("activations") == 28 * MIB
        assert host_part(long, "host_compute") - host_part(short, "host_compute") == 28 * MIB

    @pytest.mark.parametrize(("layers", "log"), [(0, 100.01), (8, 143.88), (16, 143.88)])
    def test_the_compute_buffer_of_a_mixture_with_few_large_experts(self, layers: int, log: float) -> None:
        plan = make_plan(MIXTRAL, P40, offloading(card_bytes=P40.memory_bytes, expert_layers_on_host=layers))
        assert log <= plan.part("activations") / MIB < 1.6 * log

    def test_small_experts(self) -> None:
        """Four layers with 16 experts, two on the host, `-c 2048 -np 2`: the log of 2026-11-30 has 106.51 and 9.01."""
        small = mixture_spec(replace(QWEN_3_30B_A3B, layers=4, experts=16))
        wanted = offloading(context_length=1024, max_running_requests=2, expert_layers_on_host=2)
        plan = make_plan(small, P4, wanted)
        assert 106.51 <= plan.part("activations") / MIB <= 112
        assert 9.01 <= host_part(plan, "host_compute") / MIB <= 11


class TestHostileHeaders:
    """Numbers of experts that no file should have: llama.cpp aborts on them, and a plan says so."""

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"num_experts": 0}, "it has experts, but expert_count is 0 or absent; take another copy of the file"),
            ({"num_experts": None}, "it has experts, but expert_count is 0 or absent; take another copy of the file"),
            ({"num_experts": 2**31}, "expert_count is 2,147,483,648, llama.cpp reads at most 1,024"),
            (
                {"num_experts_per_token": 0},
                "expert_used_count is 0 or absent, must be 1 to expert_count (128); take another copy",
            ),
            (
                {"num_experts_per_token": None},
                "expert_used_count is 0 or absent, must be 1 to expert_count (128); take another copy",
            ),
            (
                {"num_experts_per_token": 129},
                "expert_used_count is 129, must be 1 to expert_count (128); take another copy",
            ),
        ],
    )
    def test_are_refused_and_planned_all_the_same(self, changes: dict[str, Any], reason: str) -> None:
        spec = replace(QWEN, **changes)
        assert ENGINES["llama.cpp"].judge(spec).refusals == [reason]
        plan = make_plan(spec, P4, offloading(max_running_requests=4))
        assert plan.speed is not None
        assert plan.speed.decode.tokens_per_second > 0

    def test_a_model_has_experts_if_its_tensors_say_so(self) -> None:
        dense = replace(LLAMA_2_7B, num_experts=8, num_experts_per_token=2)
        settings = Settings.model_validate({"engine": "llama.cpp", "placement": {"experts": "cpu"}})
        with pytest.raises(ConfigurationError, match="llama is no mixture of experts"):
            ENGINES["llama.cpp"].memory.check(settings, dense)

    def test_experts_of_a_layer_beyond_the_last_are_not_tried(self) -> None:
        """Each number of layers is a plan: four billion would not end."""
        beyond = replace(QWEN.tensors[-1], name="blk.4000000000.ffn_up_exps.weight")
        spec = replace(QWEN, tensors=(*QWEN.tensors, beyond))
        assert len(ENGINES["llama.cpp"].memory.candidates(spec, offloading())) == 49


class TestBeyondTheLog:
    """Memory that llama-server takes while it answers."""

    def test_attention_copies_another_kv_type_to_half_precision(self) -> None:
        """Of one layer, keys and values of all requests: 4 KV heads x 2 x 128 x 2 B x 4096 cells each."""
        fp16, int8 = (
            make_plan(QWEN, P40, offloading(max_running_requests=2, kv_dtype=kind)) for kind in ("fp16", "int8")
        )
        assert int8.part("activations") - fp16.part("activations") == 2 * 4096 * 4 * 2 * 128 * 2

    @pytest.mark.parametrize("chunk", [512, 2048])
    def test_attention_keeps_parts_of_its_output(self, chunk: int) -> None:
        """Two blocks a multiprocessor: two parts of 32 heads x 128 values, with maximum and sum of each row."""
        plan = make_plan(QWEN, P4, offloading(chunked_prefill_tokens=chunk))
        assert plan.part("workspace") == int(2 * chunk * 32 * (128 * 4 + 8) * 1.05)

    def test_inputs_of_products_are_quantised(self) -> None:
        """The widest: 8 experts for each token of 2048 values, 36 bytes for 32, and 5 % that the pool looks ahead.

        With few cells the keys are not divided.
        """
        part = kernel_pool(QWEN, 512, P4, cells=32, sequences=1)
        assert part.n_bytes == int(512 * 8 * 2048 // 32 * 36 * 1.05)

    def test_without_dp4a_matrices_are_converted(self) -> None:
        """One expert at a time, 768 x 2048 in half precision, and the sorted rows in and out in single precision."""
        p100 = load_card("tesla-p100")
        part = kernel_pool(QWEN, 512, p100, cells=32, sequences=1)
        assert part.n_bytes == int((768 * 2048 * 2 + 512 * 8 * 4 * (2048 + 2048)) * 1.05)

    def test_matrices_of_16_bits_are_converted_without_fast_half_precision(self) -> None:
        """The output layer only if more rows than 8 are multiplied with it: one of each sequence."""
        tensors = tuple(replace(tensor, tensor_type="F16") for tensor in LLAMA_3_8B.tensors)
        spec = replace(LLAMA_3_8B, tensors=tensors)
        few, many = (kernel_pool(spec, 512, P40, cells=32, sequences=count).n_bytes for count in (8, 9))
        assert few == int(14336 * 4096 * 4 * 1.05)
        assert many == int(128256 * 4096 * 4 * 1.05)

    def test_a_batch_may_be_divided_among_more_blocks_than_a_full_one(self) -> None:
        """248 tiles and 264 blocks at once: 2 to 16 parts leave 6 % idle, 17 parts fill 16 waves."""
        assert most_blocks(248, 2, 132, 32) == 248 * 17
        assert most_blocks(512, 2, 20, 256) == 2 * 512
        assert most_blocks(512, 2, 20, 1) == 0

    @pytest.mark.parametrize(
        ("model", "changes", "beyond"),
        [
            ("Qwen3-30B-A3B", {"chunked_prefill_tokens": 2048, "max_running_requests": 2}, 82),
            ("gpt-oss-20b", {"max_running_requests": 4}, 36),
            ("Qwen3-14B", {"max_running_requests": 2}, 28),
            (
                "gpt-oss-120b",
                {"chunked_prefill_tokens": 2048, "max_running_requests": 2, "expert_layers_on_host": 25},
                143,
            ),
            (
                "GLM-4.5-Air",
                {"chunked_prefill_tokens": 2048, "max_running_requests": 2, "expert_layers_on_host": 37},
                277,
            ),
        ],
    )
    def test_what_a_gpu_had_in_use_beside_the_buffers_is_planned(
        self, model: str, changes: dict[str, Any], beyond: int
    ) -> None:
        """MiB at the peak of full-context requests on an H200 beside what a small server took (results/placement.md).

        Two parts of a full batch were there. The plan is for the batch size that is divided most, which needs more on a
        GPU with the 132 multiprocessors of an H200.
        """
        spec = catalog_spec(next(shape for shape in shapes() if shape["name"] == model))
        card = unknown_card("H200", 2**37, GpuRates(4.8e12, 132 * 128, 1.98e9, "9.0"))
        plan = make_plan(spec, card, offloading(context_length=8192, card_bytes=2**37, **changes))
        parts = 2 * plan.request.chunked_prefill_tokens * spec.num_heads * (spec.v_head_dim * 4 + 8)
        planned = sum(map(plan.part, ("workspace", "page_tables", "fragmentation")))
        assert parts / MIB <= beyond <= planned / MIB

    @pytest.mark.parametrize(
        ("changes", "expected"), [({}, True), ({"mapped": True}, False), ({"locked": True}, False)]
    )
    def test_a_card_keeps_page_tables_for_pinned_memory(self, changes: dict[str, Any], expected: bool) -> None:
        """40.2 GiB pinned took 88.5 MiB more of the card than 0.9 GiB; a mapped file is copied through a buffer."""
        spec = catalog_spec(next(shape for shape in shapes() if shape["name"] == "gpt-oss-120b"))
        plan = make_plan(spec, P40, offloading(expert_layers_on_host=25, card_bytes=P40.memory_bytes, **changes))
        found = plan.part("page_tables") / MIB
        assert (80 < found < 100) if expected else found == 0

    @pytest.mark.parametrize(
        ("model", "changes", "charged"),
        [
            ("Qwen3-30B-A3B", {"expert_layers_on_host": 36, "chunked_prefill_tokens": 2048}, 12_994),
            ("gpt-oss-20b", {"expert_layers_on_host": 12, "max_running_requests": 4}, 5_743),
            ("Qwen3-14B", {"gpu_layers": 30, "kv_dtype": "int8"}, 3_182),
            ("GLM-4.5-Air", {"expert_layers_on_host": 37, "chunked_prefill_tokens": 2048}, 50_492),
        ],
    )
    def test_a_process_is_charged_no_more_than_the_plan_without_kept_prompts(
        self, model: str, changes: dict[str, Any], charged: int
    ) -> None:
        """MiB of the control group when the server was ready (results/placement.md)."""
        spec = catalog_spec(next(shape for shape in shapes() if shape["name"] == model))
        wanted: dict[str, Any] = {"context_length": 8192, "max_running_requests": 2, "expert_layers_on_host": 0}
        plan = make_plan(spec, P4, offloading(**wanted | changes))
        planned = (plan.host_bytes - host_part(plan, "host_prompts")) / MIB
        assert charged <= planned <= 1.05 * charged

    def test_on_a_cpu_there_is_no_pool(self) -> None:
        cpu = load_card("cpu")
        plan = make_plan(QWEN, cpu, offloading(device="cpu", card_bytes=2**36))
        assert plan.part("workspace") == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "--load-mode none"), ({"locked": True}, "--load-mode mmap+mlock"), ({"mapped": True}, "--fit off, --cache")],
)
def test_the_plan_names_the_flags_that_only_the_start_decides(changes: dict[str, Any], expected: str) -> None:
    (note,) = (note for note in make_plan(QWEN, P4, offloading(**changes)).notes if "as far as its build" in note)
    assert expected in note
    on_card = make_plan(QWEN, P40, offloading(card_bytes=P40.memory_bytes))
    assert not any("as far as its build" in note for note in on_card.notes)


class TestHostCaches:
    """Prompts and states that llama-server keeps in the host's memory, to limits that its flags set."""

    def test_prompts_get_a_quarter_of_what_is_free_and_at_most_the_default(self) -> None:
        unknown, plenty = (make_plan(QWEN, P4, offloading(host_memory_bytes=free)) for free in (None, 2**37))
        assert host_part(unknown, "host_prompts") == host_part(plenty, "host_prompts") == 8 * 2**30
        tight = make_plan(QWEN, P4, offloading(host_memory_bytes=plenty.host_bytes - 8 * 2**30 + 401 * MIB))
        assert tight.fits
        assert host_part(tight, "host_prompts") == 100 * MIB
        assert host_part(make_plan(QWEN, P4, offloading(host_memory_bytes=2**32)), "host_prompts") == 0

    def test_checkpoints_of_recurrent_states_and_windows(self) -> None:
        """62.81 MiB each of Qwen3.6's states (its log), three in 8192 tokens for each of two requests."""
        spec = catalog_spec(next(shape for shape in shapes() if shape["name"] == "Qwen3.6-35B-A3B"))
        plan = make_plan(spec, P4, offloading(context_length=8192, max_running_requests=2))
        assert round(host_part(plan, "host_checkpoints") / MIB, 1) == round(2 * 3 * 62.8125, 1)
        assert host_part(make_plan(QWEN, P4, offloading()), "host_checkpoints") == 0

    def test_flags_are_those_that_the_build_has(self) -> None:
        both = frozenset({"--cache-ram", "--ctx-checkpoints"})
        assert host_cache_arguments(both, 100 * MIB, 3) == ("--cache-ram", "100", "--ctx-checkpoints", "3")
        assert host_cache_arguments(both, 0, 3)[:2] == ("--cache-ram", "0")
        assert host_cache_arguments(frozenset(), 100 * MIB, 3) == host_cache_arguments(both, None, 3) == ()


class TestChoice:
    def test_as_few_layers_as_fit(self) -> None:
        plan = make_plan(QWEN, P4, offloading())
        assert plan.fits
        chosen = plan.request.expert_layers_on_host
        assert chosen is not None
        assert 24 < chosen < 48
        fewer = make_plan(QWEN, P4, offloading(expert_layers_on_host=chosen - 1))
        assert not fewer.fits
        assert plan.engine_args[-6:-4] == ("--n-cpu-moe", str(chosen))
        assert plan.to_json()["expert_layers_on_host"] == chosen

    def test_nothing_moves_if_all_fits(self) -> None:
        plan = make_plan(QWEN, P40, offloading(card_bytes=P40.memory_bytes))
        assert plan.fits
        assert plan.request.expert_layers_on_host == 0
        assert "--n-cpu-moe" not in plan.engine_args
        assert [part.key for part in plan.host_parts] == ["host_weights"]

    def test_what_does_not_fit_with_all_experts_on_the_host_needs_whole_layers_there(self) -> None:
        small = offloading(card_bytes=1200 * MIB)
        assert not make_plan(QWEN, P4, small).fits
        plan = make_plan(QWEN, P4, replace(small, gpu_layers=None))
        assert plan.fits
        assert plan.request.expert_layers_on_host == 48
        assert plan.request.gpu_layers is not None
        assert 0 < plan.request.gpu_layers < 48
        assert plan.part("kv_pool") + host_part(plan, "host_kv") == 384 * MIB

    def test_a_dense_model_in_part(self) -> None:
        whole = offloading(card_bytes=4000 * MIB)
        assert not make_plan(LLAMA_2_7B, P4, whole).fits
        plan = make_plan(LLAMA_2_7B, P4, replace(whole, gpu_layers=None))
        assert plan.fits
        assert plan.request.gpu_layers is not None
        assert plan.engine_args[plan.engine_args.index("--n-gpu-layers") + 1] == str(plan.request.gpu_layers)
        more = make_plan(LLAMA_2_7B, P4, replace(whole, gpu_layers=plan.request.gpu_layers + 1))
        assert not more.fits

    def test_on_a_cpu_nothing_is_chosen(self) -> None:
        cpu = load_card("cpu")
        plan = make_plan(QWEN, cpu, offloading(device="cpu", card_bytes=64 * 2**30))
        assert plan.fits
        assert plan.host_parts == ()
        assert plan.request.expert_layers_on_host == 0

    def test_the_fewer_layers_on_the_host_the_faster(self) -> None:
        rates = []
        for layers in (0, 12, 24, 48):
            speed = make_plan(QWEN, P40, offloading(card_bytes=P40.memory_bytes, expert_layers_on_host=layers)).speed
            assert speed is not None
            rates.append((speed.single.tokens_per_second, speed.prefill.tokens_per_second))
        assert rates == sorted(rates, reverse=True)

    def test_a_batch_reads_the_experts_that_it_is_expected_to_choose(self) -> None:
        """Of 128 experts with 8 a token: 8, 15.5, 29.1, 51.6, 82.4 for 1, 2, 4, 8, 16 tokens."""
        from pascaline.planning.weights import weights_on_device

        weights = weights_on_device(QWEN, offloading(expert_layers_on_host=48))
        found = [128 * weights.host_read_bytes(n) / weights.host_expert_bytes for n in (1, 2, 4, 8, 16)]
        assert found == pytest.approx([8, 15.5, 29.1, 51.6, 82.4], abs=0.05)


class TestNearest:
    """The hints of a plan that does not fit: the host's memory first, because it changes no answer."""

    @pytest.mark.parametrize("layers", [0, 5])
    def test_experts_are_left_to_the_plan(self, layers: int) -> None:
        first, *_ = nearest_fits(QWEN, P4, offloading(expert_layers_on_host=layers))
        assert first.settings == {"placement.experts": "auto"}
        assert first.plan.fits
        assert first.sentence.startswith(f"placement.experts auto ({first.plan.where}): ")

    def test_layers_of_a_dense_model_are_left_to_the_plan(self) -> None:
        changes = nearest_fits(LLAMA_2_7B, P4, offloading(card_bytes=4000 * MIB))
        assert {"placement.layers": "auto"} in [change.settings for change in changes]

    def test_no_placement_helps_where_the_host_has_no_room(self) -> None:
        wanted = offloading(host_memory_bytes=2**31, expert_layers_on_host=48)
        changes = nearest_fits(QWEN, P4, wanted)
        assert not any(key.startswith("placement.") for change in changes for key in change.settings)
        text = refusal(make_plan(QWEN, P4, wanted), [])
        assert text.endswith("nothing near fits: a smaller model or more free memory of the host is needed")

    def test_a_sweep_says_which_memory_is_too_small(self) -> None:
        plans = [make_plan(QWEN, P4, offloading(**changes)) for changes in ({"host_memory_bytes": 2**31}, {})]
        lines = sweep_table([*plans, make_plan(QWEN, P4, offloading(card_bytes=2**30))], "requests").splitlines()[1:]
        assert [line.rpartition("  ")[2] for line in lines] == ["the host lacks memory", "fits", "does not fit"]

    def test_a_gpu_is_not_told_of_a_host_by_an_engine_without_one(self) -> None:
        changes = nearest_fits(LLAMA_3_8B, P4, request(P4, card_bytes=4000 * MIB))
        assert not any(key.startswith("placement.") for change in changes for key in change.settings)


def test_little_headroom_is_told_beside_an_estimated_context() -> None:
    """The plan moves weights to the host until the rest just fits."""
    tight = offloading(card_bytes=make_plan(QWEN, P4, offloading(expert_layers_on_host=30)).total_bytes + 40 * MIB)
    plan = with_hints(make_plan(QWEN, P4, tight), QWEN, P4, tight)
    (note,) = (note for note in plan.notes if "no Pascal card was measured" in note)
    assert note.startswith("the CUDA context is estimated as 160.00 MiB")
    assert "and 40.00 MiB are left" in note
    assert "put more than the experts of 30 layers on the host" in note
    roomy = replace(tight, card_bytes=P4.memory_bytes, expert_layers_on_host=40)
    plan = with_hints(make_plan(QWEN, P4, roomy), QWEN, P4, roomy)
    assert not any("no Pascal card was measured" in note for note in plan.notes)


def test_a_rate_below_one_token_has_its_digits() -> None:
    assert [rate_digits(rate) for rate in (0.476, 0.03, 1.4, 1234.5)] == ["0.48", "0.03", "1", "1,234"]


def test_locked_weights_need_memory_and_are_copied_like_mapped_ones() -> None:
    assert not make_plan(QWEN, P4, offloading(host_memory_bytes=4 * 2**30, locked=True)).fits
    locked, mapped = (make_plan(QWEN, P4, offloading(**{how: True})).speed for how in ("locked", "mapped"))
    assert locked == mapped


class TestChunkHint:
    """A larger chunk copies the host's weights less often; the plan says so if it fits."""

    def notes(self, **changes: Any) -> list[str]:
        wanted = offloading(**changes)
        plan = with_hints(make_plan(QWEN, P4, wanted), QWEN, P4, wanted)
        return [note for note in plan.notes if note.startswith("chunked_prefill_tokens 2048 fits too")]

    def test_where_experts_are_on_the_host(self) -> None:
        (note,) = self.notes()
        larger, smaller = re.findall(r"prompts at (\d+) instead of (\d+) tok/s, as", note)[0]
        assert int(larger) > 1.2 * int(smaller)

    def test_a_chunk_that_nobody_has_set_becomes_the_larger_one(self) -> None:
        wanted = offloading()
        plan = with_hints(make_plan(QWEN, P4, wanted), QWEN, P4, wanted, chunk_is_free=True)
        assert plan.request.chunked_prefill_tokens == 2048
        assert plan.fits
        assert "2048" in plan.engine_args
        assert any(note.startswith("chunked_prefill_tokens 2048, as none is set, computes") for note in plan.notes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"card_bytes": P40.memory_bytes},
            {"chunked_prefill_tokens": 2048},
            {"context_length": 1024},
            {"card_bytes": 2**30},
        ],
        ids=["all on the card", "large already", "short context", "does not fit"],
    )
    def test_nowhere_else(self, changes: dict[str, Any]) -> None:
        assert self.notes(**changes) == []


def test_a_chunk_is_free_if_neither_user_nor_a_lack_of_memory_has_set_it() -> None:
    def is_chosen(flags: dict[str, Any]) -> bool:
        return load(flags=flags, environment={}, check_host=False).origins.is_chosen("chunked_prefill_tokens")

    assert not is_chosen({})
    assert not is_chosen({"card": "tesla-p4"})
    assert is_chosen({"card": "tesla-p4", "chunked_prefill_tokens": "512"})
    origins = load(environment={}, check_host=False).origins.with_origin("chunked_prefill_tokens", 512, "on_oom")
    assert origins.is_chosen("chunked_prefill_tokens")


class TestHostMemory:
    def test_too_little_is_refused_with_both_numbers(self) -> None:
        plan = make_plan(QWEN, P4, offloading(host_memory_bytes=4 * 2**30))
        assert not plan.fits
        (reason,) = plan.reasons
        assert reason.startswith("it needs 1")
        assert "of the host's memory, which has 4.00 GiB free" in reason
        assert "placement.weights" in reason

    def test_what_is_mapped_needs_none(self) -> None:
        plan = make_plan(QWEN, P4, offloading(host_memory_bytes=4 * 2**30, mapped=True))
        assert plan.fits
        assert plan.speed is not None
        pinned = make_plan(QWEN, P4, offloading(host_memory_bytes=64 * 2**30)).speed
        assert pinned is not None
        assert plan.speed.prefill.tokens_per_second < pinned.prefill.tokens_per_second

    def test_on_a_cpu_too_only_a_mapped_file_may_be_larger(self) -> None:
        cpu = load_card("cpu")
        wanted = offloading(device="cpu", card_bytes=8 * 2**30)
        pinned = make_plan(QWEN, cpu, wanted)
        assert "set placement.weights to mapped to read from the file" in pinned.reasons[0]
        mapped = make_plan(QWEN, cpu, replace(wanted, mapped=True))
        assert mapped.fits
        (note,) = (note for note in mapped.notes if "exceed the free memory" in note)
        absent = mapped.total_bytes - 8 * 2**30
        rate = 4e8 / (absent / mapped.weights_bytes * mapped.weights_read_bytes)
        assert note.endswith(
            f"at 0.4 GB/s in this estimate, and one request is answered with at most {rate:,.2g} tok/s"
        )
        assert not make_plan(QWEN, cpu, replace(wanted, mapped=True, card_bytes=2**28)).fits

    def test_a_cpu_keeps_a_mapped_file_mapped(self) -> None:
        assert mapped_arguments(frozenset({"--no-repack"})) == ("--no-repack",)
        assert mapped_arguments(frozenset()) == ()

    def test_the_table_shows_it(self) -> None:
        plan = make_plan(QWEN, P4, offloading(host_memory_bytes=64 * 2**30))
        text = table(plan)
        assert "in the host's memory, of which 64.00 GiB are free:" in text
        assert "host's part" in explanation(plan)


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", (None, ALL_LAYERS)),
            ('experts = "gpu"', (0, ALL_LAYERS)),
            ('experts = "cpu"', (48, ALL_LAYERS)),
            ("experts = 7", (7, ALL_LAYERS)),
            ('layers = "auto"', (None, None)),
            ("layers = 8", (None, 41)),
            ("layers = 0", (None, ALL_LAYERS)),
        ],
    )
    def test_become_a_request(self, text: str, expected: tuple[int | None, int | None], tmp_path: Any) -> None:
        found = self.request(text, QWEN, tmp_path)
        assert (found.expert_layers_on_host, found.gpu_layers) == expected

    @pytest.mark.parametrize(
        ("text", "spec", "message"),
        [
            ('experts = "cpu"', LLAMA_2_7B, "placement.experts: 'cpu' is set, but llama is no mixture of experts; "),
            ("layers = 49", QWEN, "placement.layers: 49 is more than the model has, must be at most 48"),
            ("experts = 49", QWEN, "placement.experts: 49 is more layers than the model has, must be at most 48"),
        ],
    )
    def test_that_the_model_does_not_allow(self, text: str, spec: ModelSpec, message: str, tmp_path: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            self.request(text, spec, tmp_path)
        assert str(caught.value).startswith(message)

    def test_sglang_refuses_them(self, tmp_path: Any) -> None:
        file = tmp_path / "a.toml"
        file.write_text('[placement]\nexperts = "cpu"\n')
        with pytest.raises(ConfigurationError, match=r"placement.experts: 'cpu' has no counterpart in SGLang"):
            load(config_file=file, environment={}, check_host=False)

    def request(self, text: str, spec: ModelSpec, folder: Any) -> PlanRequest:
        file = folder / "a.toml"
        file.write_text(f'engine = "llama.cpp"\n[placement]\n{text}\n')
        settings = load(config_file=file, environment={}, check_host=False).settings
        return request_from_settings(settings, spec, device="cuda", dtype="float16", card_bytes=P4.memory_bytes)


def test_every_engine_makes_every_decision() -> None:
    """The first candidate leaves nothing to the plan."""
    for engine in ENGINES:
        first = ENGINES[engine].memory.candidates(QWEN, request(P4, engine=engine, expert_layers_on_host=None))[0]
        assert first.expert_layers_on_host == 0
        assert first.gpu_layers == ALL_LAYERS


FLAGS = {"--fit", "off", "--load-mode", "none", "mmap+mlock", "--no-mmap", "--mlock"}
HELP = {
    "newer": "--fit [on|off]  adjust\n-lm, --load-mode MODE  none, mmap or mlock\n",
    "older": "--mlock  lock\n--no-mmap  do not map\n",
    "silent": "",
}


class TestCommand:
    """Flags differ between builds of llama-server, and an unknown one ends it."""

    @pytest.mark.parametrize(
        ("build", "weights", "expected"),
        [
            ("newer", "pinned", ("--fit", "off", "--load-mode", "none")),
            ("newer", "mapped", ("--fit", "off")),
            ("older", "pinned", ("--no-mmap",)),
            ("older", "mapped", ()),
            ("silent", "pinned", ()),
            ("newer", "locked", ("--fit", "off", "--load-mode", "mmap+mlock")),
            ("older", "locked", ("--mlock",)),
        ],
    )
    def test_follows_the_build(
        self, build: str, weights: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pascaline.engines.llama_cpp.engine.check_limit", lambda _: None)
        program = tmp_path / "llama-server"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{HELP[build]}END\n")
        program.chmod(0o755)
        command = self.command(program, weights, 12, tmp_path)
        start = command.index("--n-cpu-moe")
        assert command[start + 1] == "12"
        assert command[start - 2 : start] == ("--n-gpu-layers", "999")
        found = tuple(word for word in command if word in FLAGS)
        assert found == expected

    def test_a_limit_of_locked_memory_is_met_before_the_start(self, tmp_path: Path) -> None:
        """llama-server itself only warns, and then serves from memory that may swap."""
        status = tmp_path / "status"
        status.write_text("CapInh:\t0000000000000000\nCapEff:\t0000000000000000\n")
        check_limit(2**30, 2**30, status)
        check_limit(2**40, resource.RLIM_INFINITY, status)
        with pytest.raises(ConfigurationError) as caught:
            check_limit(2**30, 8 * MIB, status)
        assert str(caught.value) == (
            "placement.weights: locked needs 1.00 GiB of locked memory, the limit is 8.00 MiB; raise it (systemd: "
            "LimitMEMLOCK=infinity, a shell: ulimit -l unlimited), or set placement.weights to pinned or mapped"
        )
        status.write_text("CapEff:\t0000000000004000\n")
        check_limit(2**30, 8 * MIB, status)

    def test_threads_of_a_bound_engine_keep_to_their_node(self, tmp_path: Path) -> None:
        for build, is_there in (("--numa TYPE  distribute, isolate or numactl\n", True), ("--threads N\n", False)):
            program = tmp_path / f"llama-server-{is_there}"
            program.write_text(f"#!/bin/sh\ncat <<'END'\n{build}END\n")
            program.chmod(0o755)
            bound = self.command(program, "mapped", 12, tmp_path, cpus=frozenset({0, 1}))
            assert ("numactl" in bound) == ("--numa" in bound) == is_there
            assert "--numa" not in self.command(program, "mapped", 12, tmp_path)

    def test_threads_of_an_engine_on_several_nodes_are_dealt_out(self) -> None:
        known = frozenset({"--numa"})
        assert numa_arguments(known, is_bound=False, nodes=2) == ("--numa", "distribute")
        assert numa_arguments(known, is_bound=True, nodes=2) == ("--numa", "numactl")
        assert numa_arguments(known, is_bound=False) == numa_arguments(frozenset(), is_bound=False, nodes=2) == ()

    @pytest.mark.parametrize("weights", ["pinned", "mapped", "locked"])
    def test_a_cpu_with_several_nodes_deals_its_threads_out(
        self, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No GPU says beside which node they should be."""
        monkeypatch.setattr("pascaline.engines.llama_cpp.engine.check_limit", lambda _: None)
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\necho '--numa TYPE --mlock'\n")
        program.chmod(0o755)
        task = replace(self.task(program, weights, 0, tmp_path), device="cpu")
        assert "--numa" not in ENGINES["llama.cpp"].launch(task).command
        command = ENGINES["llama.cpp"].launch(replace(task, numa_nodes=2)).command
        assert command[command.index("--numa") + 1] == "distribute"

    def test_what_it_keeps_of_prompts_is_limited_as_planned(self, tmp_path: Path) -> None:
        program = tmp_path / "llama-server"
        program.write_text("#!/bin/sh\necho '--cache-ram N --ctx-checkpoints N'\n")
        program.chmod(0o755)
        command = self.command(program, "pinned", 12, tmp_path)
        start = command.index("--cache-ram")
        assert command[start : start + 4] == ("--cache-ram", "300", "--ctx-checkpoints", "2")
        assert "--cache-ram" not in self.command(program, "pinned", 0, tmp_path)

    def test_options_are_not_asked_for_if_nothing_is_on_the_host(self, tmp_path: Path) -> None:
        program = tmp_path / "llama-server"
        program.write_text(f"#!/bin/sh\necho $1 >>{tmp_path}/asked\n")
        program.chmod(0o755)
        assert "--n-cpu-moe" not in self.command(program, "pinned", 0, tmp_path)
        assert (tmp_path / "asked").read_text() == "--list-devices\n"

    def command(
        self, program: Path, weights: str, experts: int, folder: Path, cpus: frozenset[int] = frozenset()
    ) -> tuple[str, ...]:
        return ENGINES["llama.cpp"].launch(self.task(program, weights, experts, folder, cpus)).command

    def task(self, program: Path, weights: str, experts: int, folder: Path, cpus: frozenset[int] = frozenset()) -> Task:
        settings = Settings.model_validate(
            {"engine": "llama.cpp", "engine_executable": str(program), "placement": {"weights": weights}}
        )
        return Task(
            settings=settings,
            model=ResolvedModel("gguf", folder / "m.gguf", QWEN, "m"),
            device="cuda",
            dtype="float16",
            threads=4,
            context_length=4096,
            max_total_tokens=4096,
            mem_fraction_static=None,
            prefill_bits=16,
            decode_bits=16,
            expert_layers_on_host=experts,
            prompt_cache_bytes=MIB * 300 if experts else None,
            runtime_dir=folder,
            cpus=cpus,
        )


class TestOptimize:
    """The search also decides what is on the host."""

    def test_placement_and_quantisation_for_a_stated_aim(self) -> None:
        choices = optimize(QWEN, P4, offloading(host_memory_bytes=64 * 2**30), "latency", 0.1)
        assert {choice.file_type for choice in choices} >= {"Q5_K_M", "Q6_K"}
        best = choices[0]
        assert best.plan.fits
        assert best.latency_seconds == min(choice.latency_seconds or 0.0 for choice in choices)
        assert best.plan.request.chunked_prefill_tokens > 512
        entry = best.to_json()
        assert entry["where"] == f"experts of {entry['expert_layers_on_host']} layers on the host"
        assert entry["where"] in choices_table(choices)
        # Coarser files leave more of the experts on the card.
        moved = {choice.file_type: choice.plan.request.expert_layers_on_host or 0 for choice in reversed(choices)}
        assert moved["Q5_K_M"] < moved["Q6_K"]

    def test_what_the_host_cannot_hold_is_left_out(self) -> None:
        assert optimize(QWEN, P4, offloading(host_memory_bytes=4 * 2**30), "latency", 0.2) == []

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"card_bytes": P40.memory_bytes, "expert_layers_on_host": 0}, "card"),
            ({"expert_layers_on_host": 12}, "experts of 12 layers on the host"),
            ({"gpu_layers": 40, "expert_layers_on_host": 0}, "9 layers on the host"),
            ({"gpu_layers": 40, "expert_layers_on_host": 48}, "9 layers and experts of 39 layers on the host"),
            ({"device": "cpu", "expert_layers_on_host": 0}, "host"),
        ],
    )
    def test_where_in_words(self, changes: dict[str, Any], expected: str) -> None:
        assert make_plan(QWEN, P4, offloading(**changes)).where == expected
