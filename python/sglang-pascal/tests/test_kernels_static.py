"""Limits for every kernel's machine code for Pascal, tested on any machine: upper bounds, from ptxas and
nvdisasm. Whoever makes a kernel worse sees it here; whoever makes one better may lower a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_pascal.kernels import bounds, static
from sglang_pascal.kernels.build import ToolchainError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.kernels.static import Instruction, KernelReport, Loop, innermost_loops, parse_code, parse_resources
from sglang_pascal.ops.matmul import DECODE_WIDTHS, TILE_CLOCKS, TILE_WIDTHS, most_rows_per_lane, rows_per_lane_of

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"
MAX_SHARED_BYTES = 48 * 1024
"""Of a CTA without opting in to more, which Pascal has not."""

SLOTS_PER_WEIGHT = {
    "Q4_K": {
        8: {1: 0.84, 2: 1.21, 3: 1.54, 4: 1.9, 6: 2.91, 8: 3.5, 12: 5.0, 16: 6.35, 24: 9.27, 32: 12.24},
        16: {1: 1.14, 2: 1.75, 3: 2.67, 4: 3.19, 6: 4.54, 8: 5.76, 12: 8.52, 16: 11.07, 24: 16.36},
    },
    "Q5_K": {
        8: {1: 1.47, 2: 1.8, 3: 2.15, 4: 2.52, 6: 3.84, 8: 4.46, 12: 5.96, 16: 7.28, 24: 10.34, 32: 13.44},
        16: {1: 1.76, 2: 2.38, 3: 3.52, 4: 4.17, 6: 5.51, 8: 6.73, 12: 9.37, 16: 11.96, 24: 17.47},
    },
    "Q6_K": {
        8: {1: 1.6, 2: 1.97, 3: 2.35, 4: 2.73, 6: 4.08, 8: 4.84, 12: 6.52, 16: 7.87, 24: 11.09, 32: 14.15},
        16: {1: 1.91, 2: 2.61, 3: 3.82, 4: 4.53, 6: 6.04, 8: 7.24, 12: 10.13, 16: 12.98, 24: 18.79},
    },
    "Q8_0": {
        8: {1: 0.47, 2: 0.79, 3: 1.07, 4: 1.4, 6: 2.24, 8: 2.88, 12: 4.26, 16: 5.45, 24: 8.14, 32: 10.75},
        16: {1: 0.74, 2: 1.35, 3: 2.1, 4: 2.71, 6: 3.97, 8: 5.11, 12: 7.61, 16: 10.1, 24: 15.18},
    },
    "Q4_0": {
        8: {1: 0.84, 2: 1.19, 3: 1.47, 4: 1.79, 6: 2.72, 8: 3.38, 12: 4.75, 16: 6.04, 24: 8.7, 32: 11.15},
        16: {1: 1.15, 2: 1.74, 3: 2.58, 4: 3.2, 6: 4.5, 8: 5.58, 12: 8.14, 16: 10.52, 24: 15.62},
    },
    "Q4_1": {
        8: {1: 0.84, 2: 1.2, 3: 1.53, 4: 1.9, 6: 2.88, 8: 3.58, 12: 5.09, 16: 6.49, 24: 9.41, 32: 12.15},
        16: {1: 1.14, 2: 1.75, 3: 2.58, 4: 3.27, 6: 4.7, 8: 5.82, 12: 8.5, 16: 10.98, 24: 16.33},
    },
}
"""Issue slots per weight of a decode product for all of its rows of x together, by bits and rows of x; 8.0 (Q4_K) would
be all that a P4 has at full bandwidth."""
WARPS_PER_SM = {1: 16, 2: 12, 3: 12, 4: 12, 6: 12, 8: 8, 12: 8, 16: 8, 24: 8, 32: 8}
"""The fewest warps that must be resident, by rows of x: 16 KB of loads in flight hide the memory's latency."""
MOST_LOOP_INSTRUCTIONS = 4600
"""Of a decode product's loop, up to 32 rows of x; 3000 are some 32 KB of code, which up to 12 rows stay below."""
TILE_DP4A_SHARE = {8: 0.68, 16: 0.81}
"""Least share of dp4a or dp2a in the issue slots of a tile product's inner loop, by bits of x."""
TILE_DP4A_SHARE_OF_HALF_SCALES = {8: 0.58, 16: 0.74}
MOST_TILE_LOOP_BYTES = 15 * 1024
"""Of a tile product's inner loop; a loop of 11 KB is one of the probes that a card measures."""
CLOCKS_PER_SLOT = 64 * 32 / 128
"""Of 64 weights of 32 rows, on a multiprocessor of 128 lanes."""
PRODUCTS = [(bits, n) for bits, widths in DECODE_WIDTHS.items() for n in widths]
TILES = [(bits, n) for bits, widths in TILE_WIDTHS.items() for n in widths]


pytestmark = [pytest.mark.slow("compiles every kernel for sm_60 and sm_61"), pytest.mark.timeout(2400)]


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


def decode_reports(reports, tensor_type: str) -> dict[tuple[int, int], KernelReport]:
    return {(bits, n): reports["61"][f"decode_matmul_{tensor_type}_{bits}bit_n{n}"] for bits, n in PRODUCTS}


class TestDecodeProducts:
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_issue_slots_per_weight(self, reports, tensor_type):
        found = {key: report.slots_per_weight for key, report in decode_reports(reports, tensor_type).items()}
        allowed = SLOTS_PER_WEIGHT[tensor_type]
        assert {(bits, n): slots for (bits, n), slots in found.items() if slots > allowed[bits][n]} == {}

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_occupancy(self, reports, tensor_type):
        found = {key: report.warps_per_sm for key, report in decode_reports(reports, tensor_type).items()}
        assert {key: warps for key, warps in found.items() if warps < WARPS_PER_SM[key[1]]} == {}

    @pytest.mark.parametrize(
        ("arch", "tensor_type"), [*(("61", tensor_type) for tensor_type in FORMATS), ("60", "Q4_K"), ("60", "Q4_1")]
    )
    def test_rows_per_lane_are_those_that_the_launch_counts_on(self, reports, tensor_type, arch):
        form = FORMATS[tensor_type]
        for bits, n in PRODUCTS:
            report = reports[arch][f"decode_matmul_{tensor_type}_{bits}bit_n{n}"]
            most = most_rows_per_lane(form, n, dp4a=arch == "61")
            assert report.rows_per_lane == rows_per_lane_of(bits, n, most), report.name

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_the_loop_multiplies_at_most_one_address(self, reports, tensor_type):
        """Two XMAD: a step of the types with blocks of 32 is no power of two of bytes behind the last."""
        for report in decode_reports(reports, tensor_type).values():
            assert report.main_loop.opcodes.get("XMAD", 0) <= 2, report.name

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_the_loop_is_not_longer_than_it_must_be(self, reports, tensor_type):
        for (_, n), report in decode_reports(reports, tensor_type).items():
            limit = MOST_LOOP_INSTRUCTIONS if n > 12 else 3000
            assert report.main_loop.instructions <= limit, report.name

    @pytest.mark.parametrize(("bits", "n"), [(16, 8), (8, 16)])
    def test_q4_k_stays_within_a_p4s_budget(self, reports, bits, n):
        assert decode_reports(reports, "Q4_K")[bits, n].slots_per_weight < 0.8 * bounds.budget("Q4_K")

    @pytest.mark.parametrize(("bits", "n"), [(16, 12), (8, 16)])
    def test_q4_k_takes_a_p4s_whole_budget_for_the_most_rows_that_cost_nothing(self, reports, bits, n):
        assert decode_reports(reports, "Q4_K")[bits, n].slots_per_weight < 1.03 * bounds.budget("Q4_K")


class TestOtherKernels:
    @pytest.mark.parametrize(("bits", "n"), TILES)
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_a_tile_product_is_mostly_dp4a(self, reports, tensor_type, bits, n):
        loop = reports["61"][f"tile_matmul_{tensor_type}_{bits}bit_n{n}"].main_loop
        shares = TILE_DP4A_SHARE_OF_HALF_SCALES if FORMATS[tensor_type].half_scales else TILE_DP4A_SHARE
        assert loop.opcodes["IDP"] / loop.slots >= shares[bits]

    def test_the_loop_of_a_tile_product_is_short(self, reports):
        found = {r.name: bounds.code_bytes(r.main_loop) for r in reports["61"].values() if "tile_matmul" in r.name}
        assert {name: size for name, size in found.items() if size > MOST_TILE_LOOP_BYTES} == {}

    def test_tiles_of_8_bits_can_reach_two_thirds_of_dp4a(self, reports):
        """Their inner loops, of the types with one scale for 32 weights."""
        shares = {
            r.name: 1 / bounds.slots_per_dp4a(r)
            for r in reports["61"].values()
            if r.module.startswith("tile_matmul") and r.bits == 8 and not FORMATS[r.module.split(".")[1]].half_scales
        }
        assert len(shares) == len(TILE_WIDTHS[8]) * sum(not form.half_scales for form in FORMATS.values())
        assert min(shares.values()) >= 0.65

    @pytest.mark.parametrize(("bits", "n"), TILES)
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_as_many_tiles_share_a_multiprocessor_as_the_launch_counts_on(self, reports, tensor_type, bits, n):
        report = reports["61"][f"tile_matmul_{tensor_type}_{bits}bit_n{n}"]
        assert report.warps_per_sm >= TILE_WIDTHS[bits][n] * report.threads // 32

    @pytest.mark.parametrize(("bits", "n"), TILES)
    def test_the_choice_of_kernels_counts_with_what_a_tile_takes(self, reports, bits, n):
        """Its loop's slots, and 11 to 16 % for unpacking, fetching and what stands between slices."""
        slots = reports["61"][f"tile_matmul_Q4_K_{bits}bit_n{n}"].slots_per_weight
        assert 1.10 <= TILE_CLOCKS[bits][n] / (slots * CLOCKS_PER_SLOT) <= 1.17

    def test_decode_attention_multiplies_no_addresses_in_its_inner_loop(self, reports):
        for name, report in reports["61"].items():
            if name.startswith("attention_decode"):
                assert report.main_loop.opcodes["FFMA"], name
                assert report.main_loop.opcodes.get("XMAD", 0) <= 1, (
                    name
                )  # one adds halves of registers; a product takes three

    @pytest.mark.parametrize(("bits", "n"), TILES)
    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_a_tile_product_multiplies_at_most_one_address_in_its_inner_loop(self, reports, tensor_type, bits, n):
        assert reports["61"][f"tile_matmul_{tensor_type}_{bits}bit_n{n}"].main_loop.opcodes.get("XMAD", 0) <= 1

    def test_prefill_attention_is_mostly_multiply_add(self, reports):
        for name, report in reports["61"].items():
            if name.startswith("attention_prefill"):
                assert report.main_loop.opcodes["FFMA"] / report.main_loop.slots > 0.9, name


class TestTheDocument:
    def test_it_holds_the_table_that_the_compiler_gives(self, reports):
        text = DOCUMENT.read_text()
        between = text.split(bounds.BEGIN)[1].split(bounds.END)[0].strip()
        products_60 = [report for report in reports["60"].values() if report.module.startswith(bounds.PRODUCTS_60)]
        assert between == bounds.as_markdown(list(reports["61"].values()), products_60).strip(), (
            "run: sglang-pascal kernels --update docs/kernels.md"
        )


class TestBounds:
    def test_each_kernel_of_a_batch_reads_the_weights_and_every_row_has_its_slots(self):
        def product(kind: str, tensor_type: str, bits: int, n: int) -> KernelReport:
            columns = n * bits // 8
            weights = 256 if kind == "decode_matmul" and columns <= static.UNROLLED_COLUMNS else 64
            loop = Loop(weights * columns, 0, {"IDP": weights * columns // 4})
            return KernelReport(
                f"{kind}.{tensor_type}.{bits}", f"{kind}_{tensor_type}_{bits}bit_n{n}", "61", 128, 90, 0, 0, {}, (loop,)
            )

        reports = [
            *(product("decode_matmul", kind, bits, n) for kind in ("Q4_K", "Q6_K") for bits, n in PRODUCTS),
            *(product("tile_matmul", kind, bits, n) for kind in ("Q4_K", "Q6_K") for bits, n in TILES),
        ]
        found = {(b.bits, b.batch): b for b in bounds.bounds(reports) if b.model == "Llama-3.1-8B"}
        assert sorted(found) == [(bits, batch) for bits in (8, 16) for batch in bounds.BATCHES]
        by_memory = {key: bound.memory_tokens_per_second for key, bound in found.items()}
        assert by_memory[16, 8] == by_memory[8, 8] == pytest.approx(8 * by_memory[16, 1])
        assert by_memory[16, 24] == pytest.approx(24 * by_memory[16, 1])
        assert by_memory[16, 32] == pytest.approx(32 * by_memory[16, 1])
        # One slot per weight and int8 row: what a token costs does not depend on the batch.
        by_slots = {key: bound.issue_tokens_per_second for key, bound in found.items()}
        for bits, rows in ((8, 1), (16, 2)):
            each = [slots for (of, _), slots in by_slots.items() if of == bits]
            assert each == pytest.approx([bounds.P4.lane_instructions / (rows * 7.51e9)] * len(bounds.BATCHES))


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

    def test_reports_are_kept_until_a_source_changes(self, monkeypatch, tmp_path):
        made = KernelReport("probe", "k", "61", 128, 40, 1, 2, {"LDL": 3}, (Loop(90, 20, {"IDP": 48}), Loop(2, 0, {})))
        calls = []
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(static, "find_nvdisasm", lambda: Path("/bin/true"))
        monkeypatch.setattr(static, "_analyse", lambda *module: calls.append(module) or [made])
        assert [static.analyse("61", ("probe",)) for _ in range(2)] == [[made], [made]]
        assert len(calls) == 1
        monkeypatch.setattr(static.Module, "key", lambda *_: "another")
        assert static.analyse("61", ("probe",)) == [made]
        assert len(calls) == 2

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
            "no nvdisasm of CUDA 11 or 12 is on this machine, but the table of machine code needs one; install Debian's "
            "nvidia-cuda-toolkit (non-free) or the triton wheel, or name the program by CUDA_NVDISASM"
        )
