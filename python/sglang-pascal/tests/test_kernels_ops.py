"""The operations: every case of the selftest on the GPU, the doors of each operation, and what a launch says."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from sglang_pascal import selftest
from sglang_pascal.__main__ import main
from sglang_pascal.kernels import build, driver
from sglang_pascal.kernels.build import ARCHITECTURES
from sglang_pascal.kernels.formats import FORMATS, RECORDED_BATCH_SIZES
from sglang_pascal.ops import matmul as matmul_module
from sglang_pascal.ops._call import OperationError
from sglang_pascal.ops.activations import Activations, quantize, rms_norm
from sglang_pascal.ops.attention import SPLITS, Sequences, attention_decode, attention_prefill, most_splits
from sglang_pascal.ops.kv_cache import KvPool, rope_and_store
from sglang_pascal.ops.matmul import matmul, matmul_half, splits_of
from sglang_pascal.ops.sampling import argmax, top_k_top_p_filter_
from sglang_pascal.ops.weights import UnsupportedTypeError, allocate_packed, dequantize, pack, pack_into, unpack

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
QUICK = ("repack", "dequantize", "matmul epilogue", "matmul float16", "quantize", "rms_norm", "top_k", "CUDA graph")
"""Cases that take a moment where the references compute both sides."""


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", selftest.CASES)
def test_an_operation_agrees_with_its_reference(name, architecture, monkeypatch):
    monkeypatch.setenv(driver.ARCHITECTURE_VARIABLE, architecture)
    driver._module.cache_clear()
    driver.kernel.cache_clear()
    assert selftest.CASES[name](torch.device("cuda", 0)) <= 1


@pytest.mark.parametrize("name", [name for name in selftest.CASES if name.startswith(QUICK)])
def test_the_cpu_path_has_the_shapes_and_types_of_the_kernels(name):
    assert selftest.CASES[name](CPU) <= 1


class TestSelftest:
    def test_a_wrong_result_fails_the_command(self, monkeypatch, capsys):
        monkeypatch.setattr(
            selftest, "CASES", {"good": lambda _: 0.5, "bad": lambda _: 2.0, "nan": lambda _: float("nan")}
        )
        assert main(["selftest", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["failed"] == ["bad", "nan"]

    @pytest.mark.slow("two processes import torch")
    def test_processes_give_the_outcomes_of_one(self):
        names = ["repack Q8_0", "repack Q4_0", "matmul epilogue"]
        alone, spread = (selftest.run(CPU, names, jobs) for jobs in (1, 2))
        assert [(each.name, each.error) for each in spread] == [(each.name, each.error) for each in alone]

    def test_cases_of_the_same_kernels_stay_together(self):
        groups = selftest._by_kernels(list(selftest.CASES))
        assert sorted(itertools.chain(*groups)) == sorted(selftest.CASES)
        places = {name: number for number, group in enumerate(groups) for name in group}
        assert len({places[name] for name in places if " Q4_K" in name}) == 1
        assert places["attention_decode F16 head_dim 64"] == places["attention_prefill F16 head_dim 64"]
        assert places["attention_decode F16 head_dim 64"] != places["attention_decode F16 head_dim 128"]

    def test_a_process_that_dies_fails_its_cases(self):
        future: Future[list[selftest.Outcome]] = Future()
        future.set_exception(BrokenProcessPool("terminated abruptly"))
        (outcome,) = selftest._outcomes(["argmax"], future)
        assert not outcome.passed
        assert outcome.failure == "a process of the selftest died: terminated abruptly"

    @pytest.mark.parametrize("text", ["0", "-1", "65", "two", "1.5", "²"])
    def test_a_wrong_number_of_processes_is_refused(self, text, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["selftest", "--jobs", text])
        assert ended.value.code == 2
        assert f"{text!r} must be a whole number from 1 to 64" in capsys.readouterr().err

    def test_no_matching_case_fails_too(self, capsys):
        assert main(["selftest", "no such case"]) == 1
        assert capsys.readouterr().out.endswith(": 0 of 0 cases pass\n")

    def test_a_wrong_kernel_would_be_noticed(self, monkeypatch):
        monkeypatch.setattr(selftest, "dequantize", lambda weight, *args: dequantize(weight, *args) * 1.001)
        assert selftest.CASES["dequantize Q4_K"](CPU) == float("inf")


class TestWeights:
    def test_a_matrix_is_loaded_in_pieces(self):
        raw = selftest.random_blocks("Q6_K", 100, 512)
        whole, pieces = pack(raw, "Q6_K", 512), allocate_packed("Q6_K", 100, 512, CPU)
        for first, rows in ((64, 36), (0, 32), (32, 32)):
            pack_into(pieces.row_range(first, rows), raw[first : first + rows])
        assert torch.equal(pieces.data, whole.data)
        assert torch.equal(unpack(whole.row_range(64, 36)), raw[64:])

    @pytest.mark.parametrize(("first", "rows"), [(1, 32), (32, 31), (64, 37), (96, 32)])
    def test_a_range_that_cuts_a_group_is_refused(self, first, rows):
        with pytest.raises(OperationError) as caught:
            allocate_packed("Q4_K", 100, 512, CPU).row_range(first, rows)
        assert str(caught.value) == (
            f"rows {first} to {first + rows} of a Q4_K matrix of 100 rows: "
            "a range must begin at a multiple of 32, and end at one or with the matrix"
        )

    def test_a_type_without_kernels_is_named_with_those_that_have_them(self):
        with pytest.raises(UnsupportedTypeError) as caught:
            allocate_packed("IQ2_XS", 32, 256, CPU)
        assert str(caught.value) == (
            "no kernel for tensor type IQ2_XS; types with kernels: Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1"
        )

    def test_a_row_that_blocks_do_not_divide_is_refused(self):
        with pytest.raises(UnsupportedTypeError) as caught:
            allocate_packed("Q4_K", 32, 576, CPU)
        assert str(caught.value) == "a Q4_K matrix with 576 columns: must be a multiple of 256"

    def test_dequantising_to_another_type_is_refused(self):
        with pytest.raises(OperationError, match=r"^dequantize to bfloat16, must be float16 or float32$"):
            dequantize(allocate_packed("Q8_0", 32, 256, CPU), torch.bfloat16)


class TestDoors:
    """Kernels trust their arguments, so each wrong one is refused by name."""

    @pytest.fixture
    def weight(self):
        return pack(selftest.random_blocks("Q8_0", 40, 256), "Q8_0", 256)

    def test_the_type(self):
        with pytest.raises(OperationError, match=r"^x is bfloat16, must be float16 or float32$"):
            quantize(torch.zeros(1, 32, dtype=torch.bfloat16))

    def test_the_memory_layout(self):
        with pytest.raises(OperationError) as caught:
            quantize(torch.zeros(64, 2).T)
        assert str(caught.value) == "x has strides [1, 2], must be contiguous; call contiguous() on it"

    def test_activations_of_another_width(self, weight):
        with pytest.raises(OperationError) as caught:
            matmul(quantize(torch.zeros(2, 512)), weight)
        assert str(caught.value) == "x.q has shape [2, 512], must be [any, 256]"

    def test_an_odd_number_of_halves(self, weight):
        with pytest.raises(OperationError) as caught:
            matmul(quantize(torch.zeros(5, 256)), weight, is_16_bit=True)
        assert str(caught.value) == "x.q has shape [5, 256], must be [4, 256]"

    def test_bias_and_residual(self, weight):
        x = quantize(torch.zeros(2, 256))
        with pytest.raises(OperationError, match=r"^bias has shape \[39\], must be \[40\]$"):
            matmul(x, weight, bias=torch.zeros(39))
        with pytest.raises(OperationError, match=r"^residual is float32, must be float16$"):
            matmul(x, weight, residual=torch.zeros(2, 40))

    def test_norm_and_half_weights(self):
        with pytest.raises(OperationError, match=r"^weight has shape \[31\], must be \[32\]$"):
            rms_norm(torch.zeros(1, 32), torch.ones(31), 1e-6)
        with pytest.raises(OperationError, match=r"^x is float32, must be float16$"):
            matmul_half(torch.zeros(1, 32), torch.zeros(4, 32).half())

    def test_a_pool_of_a_size_without_kernels(self):
        with pytest.raises(OperationError) as caught:
            _ = KvPool(torch.zeros(4, 1, 80).half(), torch.zeros(4, 1, 80).half()).kind
        assert str(caught.value) == (
            "no attention kernel for a head_dim of 80, must be 64, 128, 256; choose attention_backend pascal_torch "
            "(SGLang's --attention-backend), which takes any, more slowly"
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_pool_of_a_type_without_kernels(self, dtype):
        """SGLang has no fp16 to choose: a pool of float16 is that of a model in float16."""
        with pytest.raises(OperationError) as caught:
            _ = KvPool(torch.zeros(4, 1, 64, dtype=dtype), torch.zeros(4, 1, 64, dtype=dtype)).kind
        assert str(caught.value) == (
            f"no attention kernel for a KV cache of {str(dtype).removeprefix('torch.')}, must be float16, float8_e5m2 "
            "or int8; choose kv_cache.dtype (SGLang's --kv-cache-dtype) auto with dtype (--dtype) float16, or fp8_e5m2, "
            "or int8"
        )

    def test_scales_belong_to_int8_pools_only(self):
        buffer, scales = torch.zeros(4, 1, 64, dtype=torch.int8), torch.zeros(4, 1).half()
        with pytest.raises(
            OperationError, match=r"^pool\.key_scales must be given for an int8 pool, and for no other$"
        ):
            KvPool(buffer, buffer).check()
        with pytest.raises(
            OperationError, match=r"^pool\.key_scales must be given for an int8 pool, and for no other$"
        ):
            KvPool(buffer.half(), buffer.half(), scales, scales).check()

    def test_attention(self):
        pool = KvPool(torch.zeros(4, 2, 64), torch.zeros(4, 2, 64))
        sequences = Sequences(torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0]), torch.tensor([1]))
        with pytest.raises(OperationError, match=r"^query has 3 heads, must be a multiple of the pool's 2$"):
            attention_decode(torch.zeros(1, 3, 64), pool, sequences, scale=1.0, max_length=4)
        starts = torch.zeros(1, dtype=torch.int32)
        with pytest.raises(OperationError, match=r"^query_starts has shape \[1\], must be \[2\]$"):
            attention_prefill(torch.zeros(1, 2, 64), pool, sequences, starts, scale=1.0, max_new=1)
        with pytest.raises(OperationError, match=r"^req_to_token is int64, must be int32$"):
            Sequences(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0]), torch.tensor([1]))

    def test_rope_and_sampling(self):
        pool = KvPool(torch.zeros(4, 2, 64), torch.zeros(4, 2, 64))
        with pytest.raises(OperationError, match=r"^slots has shape \[2\], must be \[1\]$"):
            rope_and_store(
                torch.zeros(1, 512), torch.zeros(1).int(), torch.zeros(2).int(), torch.zeros(4, 64), pool, is_neox=True
            )
        with pytest.raises(OperationError, match=r"^logits is int64, must be float16 or float32$"):
            argmax(torch.zeros(1, 4, dtype=torch.int64))
        with pytest.raises(OperationError, match=r"^top_k is int64, must be int32$"):
            top_k_top_p_filter_(torch.ones(1, 4), torch.tensor([1]))


class TestEmptyBatches:
    def test_no_rows_give_no_rows(self):
        weight = allocate_packed("Q4_K", 40, 256, CPU)
        x = quantize(torch.zeros(0, 256))
        assert isinstance(x, Activations)
        assert matmul(x, weight).shape == (0, 40)


class TestParts:
    """Which kernels multiply how many rows of x."""

    @pytest.mark.parametrize(
        ("n", "bits", "expected"),
        [
            (0, 16, []),
            (1, 16, [(0, 1, 1, False)]),
            (16, 16, [(0, 16, 16, False)]),
            (17, 16, [(0, 17, 24, False)]),
            (26, 16, [(0, 13, 16, False), (13, 26, 16, False)]),
            (32, 16, [(0, 32, 32, True)]),
            (40, 16, [(0, 40, 40, True)]),
            (48, 16, [(0, 48, 48, True)]),
            (512, 16, [(0, 512, 64, True)]),
            (24, 8, [(0, 24, 24, False)]),
            (32, 8, [(0, 32, 32, True)]),
            (33, 8, [(0, 33, 40, True)]),
            (41, 8, [(0, 21, 24, False), (21, 41, 24, False)]),
            (48, 8, [(0, 48, 48, True)]),
            (124, 8, [(0, 124, 128, True)]),
            (128, 8, [(0, 128, 64, True)]),
            (300, 8, [(0, 252, 64, True), (252, 300, 48, True)]),
            (512, 8, [(0, 512, 64, True)]),
            (700, 8, [(0, 700, 64, True)]),
        ],
    )
    def test_those_that_cost_least_with_the_widest_tiles_first(self, n, bits, expected):
        assert [tuple(part) for part in matmul_module.parts(n, bits)] == expected

    @pytest.mark.parametrize("bits", matmul_module.DECODE_WIDTHS)
    def test_every_row_is_multiplied_once_by_a_kernel_that_holds_it(self, bits):
        for n in range(1, 300):
            found = matmul_module.parts(n, bits)
            assert [row for part in found for row in range(part.first, part.end)] == list(range(n))
            assert all(part.n <= part.width or part.is_tiles for part in found)

    @pytest.mark.parametrize("bits", matmul_module.DECODE_WIDTHS)
    def test_every_kernel_is_chosen_for_some_number_of_rows(self, bits):
        """By rows of x alone, or for a weight whose tiles fill the card better."""
        chosen = {(part.is_tiles, part.width) for n in range(1, 300) for part in matmul_module.parts(n, bits)}
        kernels = {(part.is_tiles, part.width) for part in matmul_module.every_kernel(bits)}
        assert chosen == kernels

    @pytest.mark.parametrize(
        ("bits", "largest"),
        [(8, {1: 0.0, 25: 0.03, 33: 0.12, 41: 0.09, 57: 0.07}), (16, {1: 0.0, 17: 0.07, 33: 0.06, 49: 0.07})],
    )
    def test_throughput_falls_by_no_more_than_is_known(self, bits, largest):
        """On a P4, by the estimate that chooses the kernels, of the most that fewer rows reach: where a number of rows needs the
        weights a second time, or a kernel with fewer rows of the weight a lane."""
        assert self.too_large(bits, largest, range(1, 65)) == {}

    def test_steps_padded_to_the_recorded_sizes_do_not_fall_further(self):
        """With 8 bits, which larger batches have."""
        assert self.too_large(8, {1: 0.0, 25: 0.04, 33: 0.12, 41: 0.09, 57: 0.07}, RECORDED_BATCH_SIZES) == {}

    @staticmethod
    def too_large(bits, largest, sizes):
        """Return requests -> fall where it is more than 3 % larger than known. sizes: of steps."""
        best, falls = 0.0, {}
        for n in range(1, 65):
            rows = min(size for size in sizes if size >= n)
            clocks = sum(
                matmul_module.cost(part._replace(first=0, end=part.n), bits) for part in matmul_module.parts(rows, bits)
            )
            falls[n] = max(0.0, 1 - n / clocks / best) if best else 0.0
            best = max(best, n / clocks)
        allowed = {n: largest[max(first for first in largest if first <= n)] for n in falls}
        return {n: round(fall, 3) for n, fall in falls.items() if fall > allowed[n] + 0.03}


class TestWidths:
    @pytest.mark.parametrize(("n", "longer"), [(1, 0.05), (4, 0.05), (6, 0.05), (8, 0.07), (12, 0.10)])
    def test_16_bits_cost_little_for_few_requests(self, n, longer):
        """By the estimate for a P4, as docs/results/activation-bits.md has it."""
        wide, narrow = (
            sum(matmul_module.cost(part, bits) for part in matmul_module.parts(n, bits)) for bits in (16, 8)
        )
        assert wide <= (1 + longer) * narrow


class TestFittingTiles:
    """CTAs take tiles in turn, and the multiprocessor that has most of them decides."""

    @pytest.mark.parametrize(
        ("multiprocessors", "rows", "n", "width"),
        [
            *(
                (20, 6144, 512, 64),
                (20, 28672, 512, 64),
                (132, 6144, 512, 64),
                (132, 28672, 512, 64),
                (20, 4096, 64, 32),
            ),
            *((card, rows, n, 32) for card in (20, 30, 132) for rows in (4096, 6144, 28672) for n in (17, 32)),
        ],
    )
    def test_tiles_that_leave_a_card_half_empty_are_cut_smaller(self, monkeypatch, multiprocessors, rows, n, width):
        monkeypatch.setattr(matmul_module, "multiprocessors", lambda device: multiprocessors)
        matmul_module.fitting_width.cache_clear()
        assert matmul_module.fitting_width(n, 8, rows, 1, None) == width
        matmul_module.fitting_width.cache_clear()

    @pytest.mark.parametrize(("rows", "splits"), [(4096, 4), (4096, 7)])
    def test_the_widest_of_those_that_are_as_fast_where_parts_of_k_have_ctas(self, monkeypatch, rows, splits):
        monkeypatch.setattr(matmul_module, "multiprocessors", lambda device: 132)
        matmul_module.fitting_width.cache_clear()
        assert matmul_module.fitting_width(128, 8, rows, splits, None) == 128
        matmul_module.fitting_width.cache_clear()


class TestAttentionSplits:
    @pytest.mark.parametrize(("max_length", "splits"), [(1, 1), (32, 1), (33, 2), (512, 16), (4096, 16), (4097, 17)])
    def test_there_are_enough_for_every_length_up_to_the_longest(self, max_length, splits):
        assert most_splits(max_length) == splits

    def test_the_kernels_cut_at_the_same_lengths(self):
        """`split_of`, as the header has it."""
        source = (build.SOURCES / "kv.cuh").read_text()
        longest = [int(number) for number in re.findall(r"length > (\d+)", source)]
        assert {length: 32 << i for i, length in enumerate(longest)} == SPLITS


class TestSplits:
    """The splits of K depend only on the weight, so that a row's bits do not depend on the batch."""

    @pytest.mark.parametrize(
        ("rows", "columns", "splits"),
        [(1024, 4096, 4), (2048, 4096, 2), (4096, 4096, 1), (4096, 14336, 1), (28672, 4096, 1), (32, 256, 1)],
    )
    def test_few_rows_are_cut_until_a_p4_is_full(self, rows, columns, splits):
        weight = allocate_packed("Q4_K", 32, columns, CPU)
        weight = type(weight)(weight.data, "Q4_K", rows, columns, weight.tickets)
        assert splits_of(weight) == splits

    @pytest.mark.parametrize(("rows", "columns", "splits"), [(6144, 4096, 4), (4096, 14336, 7), (28672, 4096, 1)])
    def test_a_larger_card_takes_more_parts_that_leave_no_warp_idle(self, monkeypatch, rows, columns, splits):
        monkeypatch.setattr(matmul_module, "multiprocessors", lambda device: 132)
        weight = allocate_packed("Q4_K", 32, columns, CPU)
        weight = type(weight)(weight.data, "Q4_K", rows, columns, weight.tickets)
        assert splits_of(weight) == splits
        assert weight.n_tiles % (4 * splits) == 0

    @pytest.mark.parametrize("tensor_type", FORMATS)
    def test_every_slice_of_every_split_has_tiles(self, tensor_type):
        for columns in range(1024, 16384, 256):
            weight = allocate_packed(tensor_type, 32, columns, CPU)
            assert weight.n_tiles // splits_of(weight) >= 4
