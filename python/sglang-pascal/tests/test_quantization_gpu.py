"""Quantised matrices on a GPU: what arrives through the staging buffers, and products with 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang_pascal.errors import DeviceMemoryError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.ops.activations import quantize, silu_mul_quantize
from sglang_pascal.ops.attention import Sequences, attention_decode
from sglang_pascal.ops.kv_cache import KvPool
from sglang_pascal.ops.weights import PackedWeight
from sglang_pascal.quantization.matrix import DenseMatrix, Input, PackedMatrix
from sglang_pascal.quantization.staging import Stager
from sglang_pascal.quantization.storage import storage_of
from sglang_pascal.quantization.weight_table import MatrixInfo
from sglang_pascal.reference import dequantize_ref, quantize_ref, silu_mul_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of compute capability 6.0 or newer"),
]
CUDA = torch.device("cuda", 0)
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2)}


def info(kind: str, rows: int, columns: int) -> MatrixInfo:
    from gguf.constants import GGMLQuantizationType

    return MatrixInfo("t", None, storage_of(GGMLQuantizationType[kind], "t", (rows, columns)), rows, columns)


def random_raw(kind: str, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(rows + columns)
    form = FORMATS[kind]
    data = rng.integers(0, 256, (rows * columns // form.block_weights, form.block_bytes), dtype=np.uint8)
    for offset in SCALES[kind]:
        data[:, offset : offset + 2] = (rng.random((len(data), 1)) * 0.01).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def empty(kind: str, rows: int, columns: int) -> PackedMatrix:
    data = torch.zeros(FORMATS[kind].packed_bytes(rows, columns), dtype=torch.uint8, device=CUDA)
    tickets = torch.zeros(-(-rows // 32), dtype=torch.int32, device=CUDA)
    return PackedMatrix(PackedWeight(data, kind, rows, columns, tickets))


def loaded(kind: str, rows: int, columns: int, chunk_bytes: int = 2**20) -> tuple[PackedMatrix, torch.Tensor]:
    """A matrix on the GPU, and its values on the CPU."""
    raw, matrix = random_raw(kind, rows, columns), empty(kind, rows, columns)
    Stager(CUDA, chunk_bytes).load(matrix, info(kind, rows, columns), raw)
    return matrix, dequantize_ref(torch.from_numpy(raw), kind)


def product(matrix: PackedMatrix, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(len(x), matrix.rows, dtype=dtype, device=CUDA)
    matrix.multiply(Input(x, is_16_bit=True), out)
    return out


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("chunk_bytes", [1, 100_000, 2**26])
def test_every_row_arrives_through_the_staging_buffers(kind, chunk_bytes):
    matrix, values = loaded(kind, 1000, 768, chunk_bytes)
    ids = torch.arange(1000, device=CUDA)
    assert torch.equal(matrix.lookup(ids, torch.float32).cpu(), values)


def test_float_rows_arrive_in_float16():
    values = np.random.default_rng(0).normal(size=(333, 512)).astype(np.float32)
    matrix = DenseMatrix(torch.zeros(333, 512, dtype=torch.float16, device=CUDA))
    Stager(CUDA, 10_000).load(matrix, info("F32", 333, 512), values.view(np.uint8))
    assert torch.equal(matrix.values.cpu(), torch.from_numpy(values.astype(np.float16)))


@pytest.mark.parametrize("n", [1, 3, 16, 17])
def test_16_bit_activations_are_those_of_the_reference(n):
    x = torch.randn(n, 1536, generator=torch.Generator().manual_seed(n))
    q, scales = quantize(x.to(CUDA), is_16_bit=True)
    expected_q, expected_scales = quantize_ref(x, is_16_bit=True)
    assert torch.equal(q[:n].cpu(), expected_q[:n])
    # The second int8 is 254 times as fine as the last bit that both divisions agree on: a step more or less is rounding.
    assert (q[n:].cpu().int() - expected_q[n:].int()).abs().max() <= 1
    torch.testing.assert_close(scales[..., 0].cpu(), expected_scales[..., 0], rtol=1e-6, atol=0)


def test_16_bit_activations_behind_silu_hold_sixteen_bits():
    x = torch.randn(5, 2 * 1024, generator=torch.Generator().manual_seed(5))
    q, scales = silu_mul_quantize(x.to(CUDA), is_16_bit=True)
    halves = (q.view(10, -1, 32).double() * scales[..., :1].double()).flatten(1).cpu()
    wanted = silu_mul_ref(x).double()
    block = wanted.view(5, -1, 32).abs().amax(-1, keepdim=True).expand(5, -1, 32).flatten(1)
    assert ((halves[:5] + halves[5:] - wanted).abs() <= block / 127 / 254 + 1e-5 * block).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(96, 256), (1000, 2048), (4096, 1024)])
def test_a_16_bit_product_is_that_of_the_float_activations(kind, shape):
    matrix, values = loaded(kind, *shape)
    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(7))
    wanted = x.double() @ values.double().T
    size = x.double().abs() @ values.double().abs().T
    for n in (1, 2, 5, 8, 9, 16, 17, 20):
        error = (product(matrix, x[:n].to(CUDA)).cpu().double() - wanted[:n]).abs() / size[:n]
        assert error.max() < 5e-5, (n, error.max())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_has_the_same_bits_whatever_is_multiplied_with_it(kind, dtype):
    matrix, _ = loaded(kind, 1000, 2048)
    x = torch.randn(1300, 2048, generator=torch.Generator().manual_seed(9)).to(CUDA)
    whole = product(matrix, x, dtype)
    for n in (1, 2, 4, 8, 9, 16, 17, 100):
        assert torch.equal(product(matrix, x[:n], dtype), whole[:n]), n


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_16_bit", [False, True])
def test_a_decode_quantises_its_own_output(head_dim, is_16_bit):
    generator = torch.Generator().manual_seed(head_dim)
    pool = KvPool(*(torch.randn(600, 2, head_dim, generator=generator).half().to(CUDA) for _ in range(2)))
    table = torch.randperm(600, generator=generator).int().view(2, 300).to(CUDA)
    sequences = Sequences(table, torch.arange(2, device=CUDA), torch.tensor([300, 17], device=CUDA))
    query = torch.randn(2, 6, head_dim, generator=generator).half().to(CUDA)
    plain = attention_decode(query.float(), pool, sequences, scale=0.1, max_length=300)
    found = attention_decode(
        query.float(), pool, sequences, scale=0.1, max_length=300, quantized=True, is_16_bit=is_16_bit
    )
    expected = quantize(plain, is_16_bit=is_16_bit)
    assert torch.equal(found.q, expected.q)
    assert torch.equal(found.scales, expected.scales)


def test_running_out_of_device_memory_names_the_tensor():
    torch.cuda.empty_cache()
    matrix = empty("Q8_0", 32000, 4096)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(DeviceMemoryError) as error:
            Stager(CUDA, 2**27).load(matrix, info("Q8_0", 32000, 4096), random_raw("Q8_0", 32000, 4096))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert str(error.value).startswith(
        'cuda:0 ran out of memory while repacking tensor "t" of type Q8_0, shape [32000, 4096]: '
    )
    assert str(error.value).endswith("stop other programs that use the card, or choose a smaller quantisation")
