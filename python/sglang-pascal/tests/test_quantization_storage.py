"""How tensors are held: lossless conversions, sizes, and what a file says."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.errors import CheckpointError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.quantization.convert import to_lossless
from sglang_pascal.quantization.storage import ALIGNMENT, DENSE, LOSSLESS, aligned, storage_of
from sglang_pascal.quantization.weight_table import WeightTable, summary
from support.models import SHAPES, tensor_shapes, tensor_types

SCALE_OFFSET = {"Q5_0": 0, "IQ4_NL": 0, "Q3_K": 108}


def random_rows(kind: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Any bits, but a finite scale."""
    rng = np.random.default_rng(seed)
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows * blocks, block_bytes), dtype=np.uint8)
    offset = SCALE_OFFSET[kind]
    scales = rng.normal(size=(rows * blocks, 1)).astype(np.float16)
    scales[rng.random(scales.shape) < 0.2] = 0
    data[:, offset : offset + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", LOSSLESS)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_a_lossless_conversion_keeps_every_value(kind, rows, blocks, seed):
    raw = random_rows(kind, rows, blocks, seed)
    expected = dequantize(raw, GGMLQuantizationType[kind])
    found = dequantize(to_lossless(raw, kind), GGMLQuantizationType[LOSSLESS[kind]])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_types_with_kernels_are_held_as_they_are_in_at_most_the_bytes_of_the_file(kind):
    storage = storage_of(GGMLQuantizationType[kind], "t", (4096, 4096))
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert (storage.held, storage.how) == (kind, "native")
    assert storage.n_bytes(4096, 4096) == 4096 * 4096 // block * block_bytes


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-4b"])
def test_a_model_takes_as_many_bytes_as_its_matrices_in_the_file(model):
    in_file = held = 0
    types = tensor_types(SHAPES[model], "Q4_K_M")
    for name, size in tensor_shapes(SHAPES[model]).items():
        if len(size) == 2:
            tensor_type = GGMLQuantizationType[types[name]]
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
            in_file += size[0] * size[1] // block * block_bytes
            held += aligned(storage_of(tensor_type, name, size).n_bytes(*size))
    assert held == in_file


def test_rows_of_576_columns_take_the_bytes_of_the_file_too(builtin_gguf):
    """SmolLM2-135M: no multiple of 256, the width of a tile."""
    for tensor in GgufFile(builtin_gguf).tensors.values():
        if len(tensor.shape) == 2:
            held = storage_of(tensor.tensor_type, tensor.name, tensor.shape)
            assert held.n_bytes(*tensor.shape) == tensor.n_bytes


def test_columns_are_padded_to_64_which_only_32_wide_types_can_need():
    assert storage_of(GGMLQuantizationType.Q4_1, "t", (64, 96)).n_bytes(64, 96) == 64 * 128 // 32 * 20


def test_matrices_of_one_layer_leave_no_gap():
    for form in FORMATS.values():
        assert aligned(form.record_bytes) == form.record_bytes
    assert aligned(1) == ALIGNMENT


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q5_1", "Q2_K", "IQ4_XS"])
def test_other_types_become_float16(kind):
    storage = storage_of(GGMLQuantizationType[kind], "t", (2, 256))
    assert (storage.held, storage.how, storage.n_bytes(2, 256)) == (DENSE, "dense", 1024)


def test_a_type_that_holds_no_weights_is_refused():
    with pytest.raises(CheckpointError) as error:
        storage_of(GGMLQuantizationType.I32, "blk.0.attn_q.weight", (64, 32))
    assert str(error.value) == (
        'tensor "blk.0.attn_q.weight" of shape [64, 32] has type I32, which holds no weights; '
        "quantise the model to one of Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1"
    )


@pytest.mark.parametrize("tensor_type", GGMLQuantizationType, ids=lambda tensor_type: tensor_type.name)
def test_every_type_is_decoded_or_refused(tensor_type):
    block, block_bytes = GGML_QUANT_SIZES[tensor_type]
    try:
        storage_of(tensor_type, "t", (2, block))
    except CheckpointError:
        return
    assert dequantize(np.zeros((2, block_bytes), dtype=np.uint8), tensor_type).shape == (2, block)


@pytest.fixture(scope="module")
def table(build_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "m.gguf"
    build_model("llama", path, tensor_type=GGMLQuantizationType.Q5_0)
    return WeightTable(GgufFile(path))


class TestWeightTable:
    def test_a_merged_layer_has_its_parts_in_row_order(self, table):
        parts = table.parts_of("model.layers.0.self_attn.qkv_proj")
        assert [(part.shard_id, part.rows, part.columns) for part in parts] == [
            ("q", 128, 64),
            ("k", 64, 64),
            ("v", 64, 64),
        ]
        assert [part.shard_id for part in table.parts_of("model.layers.3.mlp.gate_up_proj")] == [0, 1]

    def test_a_single_matrix_has_no_shard(self, table):
        (part,) = table.parts_of("model.layers.1.mlp.down_proj")
        assert (part.shard_id, part.storage.tensor_type, part.storage.held) == (None, "Q5_0", "Q8_0")
        assert str(part) == 'tensor "model.layers.1.mlp.down_proj" of type Q5_0, shape [64, 96]'

    def test_norms_are_not_in_it(self, table):
        assert "model.embed_tokens" in table
        assert "model.norm" not in table
        assert "model.layers.0.input_layernorm" not in table

    def test_what_the_file_lacks_is_named(self, table):
        with pytest.raises(CheckpointError) as error:
            table.parts_of("model.layers.9.mlp.down_proj")
        assert str(error.value).endswith(
            'm.gguf" has no tensor for "model.layers.9.mlp.down_proj", which its architecture needs; '
            "convert the model again"
        )

    def test_the_summary_names_what_is_not_native(self, table):
        assert summary(table.parts_of("model.layers.0.mlp.gate_up_proj")) == "Q5_0 as Q8_0 without loss 2"
