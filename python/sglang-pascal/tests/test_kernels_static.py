"""What must hold of every kernel's machine code for Pascal, whatever card is at hand: upper bounds, from ptxas and
nvdisasm. Whoever makes a kernel worse sees it here; whoever makes one better may lower a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_pascal.kernels import static, table
from sglang_pascal.kernels.build import ToolchainError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.kernels.static import Instruction, KernelReport, Loop, innermost_loops, parse_code, parse_resources
from sglang_pascal.ops.matmul import DECODE_COLUMNS

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"
MAX_SHARED_BYTES = 48 * 1024
"""Of a CTA without opting in to more, which Pascal has not."""

SLOTS_PER_WEIGHT = {
    "Q4_K": {1: 0.90, 2: 1.25, 4: 1.90, 8: 3.35, 16: 6.2},
    "Q5_K": {1: 1.55, 2: 1.90, 4: 2.50, 8: 3.95, 16: 6.8},
    "Q6_K": {1: 1.70, 2: 2.05, 4: 2.75, 8: 4.35, 16: 7.4},
    "Q8_0": {1: 0.52, 2: 0.85, 4: 1.45, 8: 2.70, 16: 5.3},
    "Q4_0": {1: 0.90, 2: 1.20, 4: 1.80, 8: 3.10, 16: 5.7},
    "Q4_1": {1: 0.90, 2: 1.25, 4: 1.90, 8: 3.30, 16: 6.2},
}
"""Issue slots per weight of a decode product for N columns together; 8.0 (Q4_K) would be all that a P4 has at full
bandwidth."""
WARPS_PER_SM = {1: 16, 2: 16, 4: 12, 8: 12, 16: 8}
"""At least so many resident: 16 KB of loads in flight hide the memory's latency."""
TILE_DP4A_SHARE = 0.68
"""Of the issue slots in a tile product's inner loop at least so many are dp4a."""


pytestmark = pytest.mark.slow("compiles every kernel for sm_60 and sm_61")


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, KernelReport]]:
    try:
        return {arch: {report.name: report for report in static.analyse(arch)} for arch in ("60", "61")}
    except ToolchainError as exc:
        pytest.skip(f"needs NVRTC and ptxas 11.8, and nvdisasm: {exc}")


class TestEveryKernel:
    def test_no_register_is_spilled(self, reports):
        assert [r.name for arch in reports.values() for r in arch.values() if r.spill_bytes] == []

    def test_no_slow_arithmetic_and_no_local_memory(self, reports):
        found = {f"sm_{a} {r.name}": r.slow_opcodes for a, rs in reports.items() for r in rs.values() if r.slow_opcodes}
        assert found == {}

    def test_shared_memory_fits_a_cta(self, reports):
        assert [r.name for arch in reports.values() for r in arch.values() if r.shared_bytes > MAX_SHARED_BYTES] == []

    def test_both_architectures_have_the_same_kernels_but_the_probe_of_dp4a(self, reports):
        assert reports["61"].keys() - reports["60"].keys() == {"probe_dp4a"}
        assert reports["60"].keys() <= reports["61"].keys()


class TestDecodeProducts:
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_issue_slots_per_weight(self, reports, tensor_type):
        allowed = SLOTS_PER_WEIGHT[tensor_type]
        found = {n: reports["61"][f"decode_matmul_{tensor_type}_n{n}"].slots_per_weight for n in allowed}
        assert {n: slots for n, slots in found.items() if slots > allowed[n]} == {}

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_occupancy(self, reports, tensor_type):
        found = {n: reports["61"][f"decode_matmul_{tensor_type}_n{n}"].warps_per_sm for n in WARPS_PER_SM}
        assert {n: warps for n, warps in found.items() if warps < WARPS_PER_SM[n]} == {}

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_rows_per_lane_are_those_that_the_launch_counts_on(self, reports, tensor_type):
        form = FORMATS[tensor_type]
        for n in WARPS_PER_SM:
            assert reports["61"][f"decode_matmul_{tensor_type}_n{n}"].rows_per_lane == form.rows_per_lane(n)

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_no_integer_multiplication_in_the_loop(self, reports, tensor_type):
        for n in WARPS_PER_SM:
            assert "XMAD" not in reports["61"][f"decode_matmul_{tensor_type}_n{n}"].main_loop.opcodes

    def test_q4_k_stays_within_a_p4s_budget_up_to_16_columns(self, reports):
        slots = reports["61"]["decode_matmul_Q4_K_n16"].slots_per_weight
        assert slots < 0.8 * table.budget("Q4_K")


class TestOtherKernels:
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_a_tile_product_is_mostly_dp4a(self, reports, tensor_type):
        loop = reports["61"][f"tile_matmul_{tensor_type}"].main_loop
        share = loop.opcodes["IDP"] / loop.slots
        assert share >= (TILE_DP4A_SHARE if not FORMATS[tensor_type].half_scales else 0.6)

    def test_decode_attention_multiplies_no_addresses_in_its_inner_loop(self, reports):
        for name, report in reports["61"].items():
            if name.startswith("attention_decode"):
                assert report.main_loop.opcodes["FFMA"], name
                assert "XMAD" not in report.main_loop.opcodes, name

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_a_tile_product_multiplies_at_most_one_address_in_its_inner_loop(self, reports, tensor_type):
        assert reports["61"][f"tile_matmul_{tensor_type}"].main_loop.opcodes.get("XMAD", 0) <= 1

    def test_prefill_attention_is_mostly_multiply_add(self, reports):
        for name, report in reports["61"].items():
            if name.startswith("attention_prefill"):
                assert report.main_loop.opcodes["FFMA"] / report.main_loop.slots > 0.9, name


class TestTheDocument:
    def test_it_holds_the_table_that_the_compiler_gives(self, reports):
        text = DOCUMENT.read_text()
        between = text.split(table.BEGIN)[1].split(table.END)[0].strip()
        assert between == table.as_markdown(list(reports["61"].values())).strip(), (
            "run: sglang-pascal kernels --update docs/kernels.md"
        )


class TestBounds:
    def test_a_request_is_two_columns_and_more_than_eight_are_two_passes(self):
        def decode(kind: str, n: int, slots: int) -> KernelReport:
            loop = Loop(slots, 0, {"IDP": 64 * n})
            return KernelReport(f"decode_matmul.{kind}", f"decode_matmul_{kind}_n{n}", "61", 128, 90, 0, 0, {}, (loop,))

        reports = [decode(kind, n, 256 * n) for kind in ("Q4_K", "Q6_K") for n in (1, 2, 4, 8, 16)]
        found = {bound.batch: bound for bound in table.bounds(reports) if bound.model == "Llama-3.1-8B"}
        assert {batch: (bound.columns, bound.passes) for batch, bound in found.items()} == {
            1: (2, 1),
            2: (4, 1),
            4: (8, 1),
            8: (16, 1),
            16: (16, 2),
        }
        by_memory = {batch: bound.memory_tokens_per_second for batch, bound in found.items()}
        assert by_memory[8] == pytest.approx(8 * by_memory[1])
        assert by_memory[16] == pytest.approx(by_memory[8])
        # One slot per weight and column: both int8 of a token cost the same whatever the batch is.
        by_slots = [bound.issue_tokens_per_second for bound in found.values()]
        assert by_slots == pytest.approx([table.P4_LANE_INSTRUCTIONS / (2 * 7.51e9)] * 5)

    def test_the_columns_are_those_of_the_operations(self):
        assert table.MOST_COLUMNS == DECODE_COLUMNS


class TestReading:
    def test_resources_are_read_from_ptxas(self):
        log = (
            "ptxas info    : Compiling entry function 'a' for 'sm_61'\n"
            "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
            "ptxas info    : Used 40 registers, 1024 bytes smem, 344 bytes cmem[0]\n"
            "ptxas info    : Compiling entry function 'b' for 'sm_61'\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 255 registers, 344 bytes cmem[0]\n"
        )
        assert parse_resources(log) == {"a": (40, 1024, 8), "b": (255, 0, 0)}

    def test_code_is_read_with_labels_branches_and_pairs(self):
        text = (
            '\t.section\t.text.f,"ax"\n'
            ".L_1:\n"
            "        /*0008*/                   LDG.E.CI.128 R4, [R2] ;\n"
            "        /*0010*/         {         FFMA R0, R1, R2, R0 ;\n"
            "        /*0018*/                   LDS.U.128 R8, [R3]         }\n"
            "        /*0028*/              @!P0 BRA `(.L_1) ;\n"
            ".L_2:\n"
            "        /*0030*/                   BRA `(.L_2) ;\n"
        )
        code = parse_code(text)["f"]
        assert [line.opcode for line in code] == ["LDG", "FFMA", "LDS", "BRA", "BRA"]
        assert innermost_loops(code) == [Loop(4, 1, {"LDG": 1, "FFMA": 1, "LDS": 1, "BRA": 1})]

    def test_a_loop_that_only_multiplies_addresses_is_not_the_main_one(self):
        addresses, products = Loop(90, 20, {"XMAD": 48}), Loop(60, 10, {"FFMA": 16})
        report = KernelReport("attention_decode.F16.128", "k", "61", 128, 40, 0, 0, {}, (addresses, products))
        assert report.main_loop == products

    def test_an_outer_loop_is_not_counted(self):
        code = [
            Instruction("MOV", None, False, ("out",)),
            Instruction("FFMA", None, False, ("in",)),
            Instruction("BRA", "in", False),
            Instruction("BRA", "out", False),
        ]
        assert innermost_loops(code) == [Loop(2, 0, {"FFMA": 1, "BRA": 1})]

    @pytest.mark.parametrize(
        ("registers", "shared", "architecture", "warps"),
        [(40, 0, "61", 48), (64, 0, "61", 32), (255, 0, "61", 8), (32, 40 * 1024, "61", 8), (32, 40 * 1024, "60", 4)],
    )
    def test_occupancy_is_what_registers_and_shared_memory_allow(self, registers, shared, architecture, warps):
        report = KernelReport("m", "k", architecture, 128, registers, shared, 0, {}, ())
        assert report.warps_per_sm == warps

    def test_a_missing_disassembler_is_named_with_remedies(self, monkeypatch):
        monkeypatch.setattr(static, "candidates", lambda *_: iter(()))
        monkeypatch.setattr(static, "_of_triton", list)
        monkeypatch.setenv("PATH", "/nonexistent")
        monkeypatch.delenv(static.NVDISASM_VARIABLE, raising=False)
        static.find_nvdisasm.cache_clear()
        with pytest.raises(ToolchainError) as caught:
            static.find_nvdisasm()
        static.find_nvdisasm.cache_clear()
        assert str(caught.value) == (
            "no nvdisasm of CUDA 11 or 12 is on this machine, which the table of machine code needs; install Debian's "
            "nvidia-cuda-toolkit (non-free) or the triton wheel, or name the program by CUDA_NVDISASM"
        )
