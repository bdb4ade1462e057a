"""Matrices in memory: loading in chunks, products and lookups, against the dequantised tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.ops.activations import quantize, rms_norm_quantize
from sglang_pascal.ops.weights import PackedWeight
from sglang_pascal.quantization import matrix as matrix_module
from sglang_pascal.quantization.handover import hand_over_activations, take_activations
from sglang_pascal.quantization.matrix import DenseMatrix, Input, PackedMatrix, join_adjacent
from sglang_pascal.quantization.staging import Stager
from sglang_pascal.quantization.storage import aligned, storage_of
from sglang_pascal.quantization.weight_table import MatrixInfo
from sglang_pascal.reference import dequantize_ref, quantize_ref, rms_norm_ref

CPU = torch.device("cpu")
SHAPES = [(1, 256), (31, 512), (33, 768), (64, 256), (100, 1024)]


def random_raw(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Blocks with finite, small scales."""
    rng = np.random.default_rng(seed)
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows * columns // block, block_bytes), dtype=np.uint8)
    for offset in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2)}[kind]:
        scales = (rng.random((len(data), 1)) * 0.01).astype(np.float16)
        data[:, offset : offset + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


def packed(kind: str, rows: int, columns: int, data: torch.Tensor | None = None) -> PackedMatrix:
    if data is None:
        data = torch.zeros(FORMATS[kind].packed_bytes(rows, columns), dtype=torch.uint8)
    return PackedMatrix(PackedWeight(data, kind, rows, columns, torch.zeros(-(-rows // 32), dtype=torch.int32)))


def info(kind: str, rows: int, columns: int) -> MatrixInfo:
    storage = storage_of(GGMLQuantizationType[kind], "t", (rows, columns))
    return MatrixInfo("t", None, storage, rows, columns)


def product(matrix, x: torch.Tensor, is_16_bit: bool = False) -> torch.Tensor:
    out = torch.empty(len(x), matrix.rows)
    matrix.multiply(Input(x, is_16_bit=is_16_bit), out)
    return out


def exact(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """With the activations as they are after quantisation."""
    q, scales = quantize_ref(x)
    values = (q.view(*scales.shape[:2], 32).double() * scales[..., :1].double()).flatten(1)[:, : x.shape[1]]
    return (values @ weights.double().T).float()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 2**30])
def test_what_is_loaded_in_chunks_multiplies_as_the_file_says(kind, rows, columns, chunk_bytes):
    raw = random_raw(kind, rows, columns)
    matrix = packed(kind, rows, columns)
    Stager(CPU, chunk_bytes).load(matrix, info(kind, rows, columns), raw)
    weights = dequantize_ref(torch.from_numpy(raw), kind)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product(matrix, x), exact(x, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_16_bit_activations_are_a_hundred_times_as_exact(kind):
    raw = random_raw(kind, 64, 1024)
    matrix = packed(kind, 64, 1024)
    Stager(CPU).load(matrix, info(kind, 64, 1024), raw)
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(2))
    wanted = (x.double() @ dequantize_ref(torch.from_numpy(raw), kind).double().T).float()
    narrow = (product(matrix, x) - wanted).square().mean().sqrt()
    fine = (product(matrix, x, is_16_bit=True) - wanted).square().mean().sqrt()
    assert fine < narrow / 100


def test_the_chunks_of_a_product_do_not_change_it(monkeypatch):
    raw = random_raw("Q4_K", 200, 512)
    matrix = packed("Q4_K", 200, 512)
    Stager(CPU).load(matrix, info("Q4_K", 200, 512), raw)
    x = torch.randn(5, 512)
    whole = product(matrix, x)
    monkeypatch.setattr(matrix_module, "CPU_CHUNK_WEIGHTS", 32 * 512)
    assert torch.equal(product(matrix, x), whole)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lookup_gives_the_rows_of_the_dequantised_tensor(kind):
    raw = random_raw(kind, 100, 512)
    matrix = packed(kind, 100, 512)
    Stager(CPU).load(matrix, info(kind, 100, 512), raw)
    ids = torch.tensor([0, 31, 32, 99, 31, 5])
    expected = dequantize_ref(torch.from_numpy(raw), kind)[ids]
    assert torch.equal(matrix.lookup(ids, torch.float32), expected)
    assert matrix.lookup(ids, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_1"])
def test_a_dense_matrix_holds_the_values_in_float16(kind):
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(3).normal(size=(40, 64)).astype(np.float32)
    raw = quantize(values, GGMLQuantizationType[kind]).view(np.uint8).reshape(40, -1)
    matrix = DenseMatrix(torch.zeros(40, 64, dtype=torch.float16))
    Stager(CPU, 1).load(matrix, info(kind, 40, 64), raw)
    expected = torch.from_numpy(
        np.array(
            dequantize(
                raw.view(np.float32 if kind == "F32" else np.float16 if kind == "F16" else np.uint8),
                GGMLQuantizationType[kind],
            ),
            dtype=np.float16,
        )
    )
    assert torch.equal(matrix.values, expected)
    x = torch.randn(2, 64)
    torch.testing.assert_close(product(matrix, x), x @ expected.float().T)
    assert torch.equal(matrix.lookup(torch.tensor([7, 39]), torch.float32), expected[[7, 39]].float())


class TestJoining:
    def side_by_side(self, kinds, rows):
        """Matrices in one allocation, as a layer holds them."""
        sizes = [aligned(FORMATS[kind].packed_bytes(n, 512)) for kind, n in zip(kinds, rows, strict=True)]
        parts = torch.zeros(sum(sizes), dtype=torch.uint8).split(sizes)
        matrices = []
        for seed, (kind, n, data) in enumerate(zip(kinds, rows, parts, strict=True)):
            matrix = packed(kind, n, 512, data)
            Stager(CPU).load(matrix, info(kind, n, 512), random_raw(kind, n, 512, seed))
            matrices.append(matrix)
        return matrices

    @pytest.mark.parametrize(
        ("kinds", "rows", "expected"),
        [
            (("Q4_K", "Q4_K", "Q4_K"), (64, 32, 32), [128]),
            (("Q4_K", "Q4_K", "Q6_K"), (64, 32, 32), [96, 32]),
            (("Q4_K", "Q6_K", "Q4_K"), (64, 32, 32), [64, 32, 32]),
            (("Q8_0", "Q8_0"), (33, 32), [33, 32]),
            (("Q8_0", "Q8_0"), (32, 33), [65]),
        ],
    )
    def test_neighbours_of_one_type_become_one(self, kinds, rows, expected):
        matrices = self.side_by_side(kinds, rows)
        joined = join_adjacent(matrices)
        assert [matrix.rows for matrix in joined] == expected
        x = torch.randn(2, 512)
        apart = torch.cat([product(matrix, x) for matrix in matrices], dim=1)
        assert torch.equal(torch.cat([product(matrix, x) for matrix in joined], dim=1), apart)

    def test_dense_neighbours_become_one(self):
        values = torch.randn(6, 8).half()
        first, second = DenseMatrix(values[:4]), DenseMatrix(values[4:])
        (joined,) = join_adjacent([first, second])
        assert torch.equal(joined.values, values)

    def test_strangers_stay_apart(self):
        first, second = packed("Q4_0", 32, 256), packed("Q4_0", 32, 256)
        assert join_adjacent([first, second]) == [first, second]


def test_an_input_is_quantised_once():
    x = Input(torch.randn(2, 256), is_16_bit=False)
    assert x.quantized is x.quantized
    assert Input(torch.randn(2, 256).bfloat16(), is_16_bit=False).quantized.q.dtype == torch.int8


def test_rows_are_counted_once_with_8_or_16_bits():
    x = Input(torch.randn(3, 256), is_16_bit=True)
    assert (x.n, len(x.quantized.q)) == (3, 6)
    assert Input(None, x.quantized, is_16_bit=True).n == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_dense_matrix_multiplies_half_and_wider_activations_into_some_columns_of_a_result(dtype):
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    values = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).half()
    result = torch.full((3, 60), 7.0)
    DenseMatrix(values).multiply(Input(x.to(dtype), is_16_bit=True), result[:, 10:50])
    wanted = x.to(dtype).double() @ values.double().T
    torch.testing.assert_close(result[:, 10:50].double(), wanted, rtol=1e-5, atol=1e-4)
    assert (result[:, :10] == 7).all()
    assert (result[:, 50:] == 7).all()


class TestHandingOver:
    def test_what_a_norm_has_quantised_is_not_quantised_again(self):
        x = torch.randn(2, 256)
        activations = quantize(x, is_16_bit=True)
        hand_over_activations(x, activations)
        assert Input(x, take_activations(x), is_16_bit=True).quantized is activations

    def test_only_the_first_taker_gets_it(self):
        x = torch.randn(2, 256)
        hand_over_activations(x, quantize(x))
        assert take_activations(x) is not None
        assert take_activations(x) is None

    def test_a_view_or_a_copy_has_nothing_to_take(self):
        x = torch.randn(2, 256)
        hand_over_activations(x, quantize(x))
        assert (take_activations(x.clone()), take_activations(x.view(2, 256))) == (None, None)

    @pytest.mark.parametrize("is_16_bit", [False, True])
    def test_a_norm_gives_the_floats_and_their_activations(self, is_16_bit):
        x, weight, residual = torch.randn(3, 300), torch.rand(300), torch.randn(3, 300)
        total, output = x + residual, torch.empty(3, 300)
        found = rms_norm_quantize(x, weight, 1e-6, residual, is_16_bit=is_16_bit, output=output)
        wanted = rms_norm_ref(total, weight, 1e-6)
        assert torch.equal(residual, total)
        assert torch.equal(output, wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, quantize_ref(wanted, is_16_bit=is_16_bit), strict=True))
