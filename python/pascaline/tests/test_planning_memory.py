"""Bytes of weights, KV cache and the rest: by the header exactly, and as the plugin and llama.cpp hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pascaline.cards import card_names, load_card
from pascaline.engines import ENGINES
from pascaline.engines.kv_layers import layer_groups
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.engines.llama_cpp.states import recurrent_bytes
from pascaline.engines.memory_model import HeldTensor
from pascaline.engines.sglang import SglangEngine
from pascaline.engines.sglang.buffers import graph_sizes
from pascaline.engines.sglang.weights import HELD_AS
from pascaline.models.reader import read_model
from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.planning import PlanRequest, make_plan
from pascaline.planning.mixtures import MIXTURES, requantized
from pascaline.planning.weights import weights_on_device
from support.models import PUBLISHED_BYTES, SHAPES, tensor_types, tiny, write_gguf
from support.planning import LLAMA_2_7B, LLAMA_3_8B, P4, QWEN_3_4B, request, spec_of

GEMMA = spec_of(SHAPES["gemma-2-9b"], sliding_window=4096, sliding_layer_ids=tuple(range(0, 42, 2)), sliding_layers=21)
SGLANG, LLAMA_CPP = SglangEngine.memory, LlamaCppEngine.memory
HEADER_BYTES = 12 << 20
"""More than any header of a published file: its tokenizer."""


def held_by(tensor: TensorSpec, spec: ModelSpec, wanted: PlanRequest) -> HeldTensor:
    held = ENGINES[wanted.engine].memory.held(tensor, spec, wanted, tied=False)
    assert held is not None
    return held


def kv_bytes_per_token(spec: ModelSpec, wanted: PlanRequest) -> int:
    return ENGINES[wanted.engine].memory.kv_bytes_per_token(spec, wanted)


class TestWeights:
    def test_a_size_that_is_not_recorded_adds_a_graph(self) -> None:
        assert [len(graph_sizes(n)) for n in (1, 4, 12, 15, 32, 33, 64, 65)] == [1, 4, 12, 15, 24, 25, 28, 28]

    @pytest.mark.parametrize("kind", sorted(HELD_AS))
    @pytest.mark.parametrize("shape", [(32, 256), (33, 256), (1, 512), (4096, 4096), (152064, 3584)])
    def test_a_matrix_takes_what_the_plugin_allocates(self, kind: str, shape: tuple[int, int]) -> None:
        storage = pytest.importorskip("sglang_pascal.quantization.storage", reason="sglang-pascal is not installed")
        held = storage.Storage(kind, HELD_AS[kind])
        tensor = TensorSpec("blk.0.attn_q.weight", shape, kind, 0)
        assert held_by(tensor, LLAMA_2_7B, request()).n_bytes == held.n_bytes(*shape)

    @pytest.mark.parametrize(
        ("kind", "n_bytes"), [("F32", 2), ("F16", 2), ("BF16", 2), ("Q5_1", 2), ("IQ2_XXS", 2), ("Q2_K", 2)]
    )
    def test_types_without_kernels_become_float16(self, kind: str, n_bytes: int) -> None:
        tensor = TensorSpec("blk.0.attn_q.weight", (64, 512), kind, 0)
        assert held_by(tensor, LLAMA_2_7B, request()).n_bytes == 64 * 512 * n_bytes

    @pytest.mark.parametrize(
        ("device", "quantization", "stays"),
        [("cuda", None, True), ("cuda", "gguf", True), ("cpu", None, False), ("cpu", "gguf", True)],
    )
    def test_a_cpu_dequantises_unless_told_otherwise(self, device: str, quantization: str, stays: bool) -> None:
        wanted = request(device=device, quantization=quantization)
        expected = 64 * 512 * 144 // 256 if stays else 64 * 512 * 2
        assert held_by(TensorSpec("blk.0.attn_q.weight", (64, 512), "Q4_K", 0), LLAMA_2_7B, wanted).n_bytes == expected

    def test_a_vector_is_in_the_type_of_the_computation(self) -> None:
        tensor = TensorSpec("blk.0.attn_norm.weight", (4096,), "F32", 4 * 4096)
        assert held_by(tensor, LLAMA_2_7B, request()).n_bytes == 2 * 4096
        assert held_by(tensor, LLAMA_2_7B, request(engine="llama.cpp")).n_bytes == 4 * 4096

    def test_a_vocabulary_is_padded(self) -> None:
        tensor = TensorSpec("model.embed_tokens.weight", (32007, 64), "F16", 0)
        spec = replace(LLAMA_2_7B, format="safetensors")
        assert held_by(tensor, spec, request()).n_bytes == 32064 * 64 * 2

    def test_quantised_safetensors_stay_as_they_are(self) -> None:
        tensor = TensorSpec("model.layers.0.mlp.up_proj.qweight", (512, 512), "I32", 512 * 512 * 4)
        assert held_by(tensor, replace(LLAMA_2_7B, format="safetensors"), request()).n_bytes == 512 * 512 * 4

    def test_bitsandbytes_takes_half_a_byte_and_its_scales(self) -> None:
        spec, wanted = replace(LLAMA_2_7B, format="safetensors"), request(quantization="bitsandbytes")
        matrix = TensorSpec("model.layers.0.mlp.up_proj.weight", (4096, 4096), "F16", 0)
        assert held_by(matrix, spec, wanted).n_bytes == 4096 * 4096 // 2 + 4096 * 4096 // 64 + 4096 * 4096 // 4096
        head = TensorSpec("lm_head.weight", (4096, 4096), "F16", 0)
        assert held_by(head, spec, wanted).n_bytes == 2 * 4096 * 4096

    def test_a_tied_matrix_counts_once_in_sglang_and_on_both_sides_in_llama_cpp(self) -> None:
        embedding = next(tensor for tensor in QWEN_3_4B.tensors if tensor.name == "token_embd.weight")
        sglang = weights_on_device(QWEN_3_4B, request())
        llama = weights_on_device(QWEN_3_4B, request(engine="llama.cpp"))
        assert sglang.host_bytes == 0
        assert llama.host_bytes == embedding.n_bytes
        assert llama.n_bytes == QWEN_3_4B.weights_bytes

    def test_llama_cpp_keeps_an_untied_embedding_on_the_host(self) -> None:
        llama = weights_on_device(LLAMA_2_7B, request(engine="llama.cpp"))
        # The columns of the matrices in the other direction are no multiple of 512: padded, then rounded up to 128.
        padded = sum(-(-tensor.n_bytes // 128) * 128 - tensor.n_bytes for tensor in LLAMA_2_7B.tensors)
        assert 0 <= llama.n_bytes + llama.host_bytes - LLAMA_2_7B.weights_bytes - padded < 32 * 512

    def test_a_step_reads_all_but_the_input_embedding(self) -> None:
        found = weights_on_device(LLAMA_2_7B, request(engine="llama.cpp"))
        assert found.dense_read_bytes == found.n_bytes
        assert found.macs == LLAMA_2_7B.n_parameters - 32000 * 4096 - 65 * 4096

    def test_a_mixture_of_experts_reads_what_it_uses(self) -> None:
        experts = tuple(
            TensorSpec(f"blk.0.ffn_{part}_exps.weight", (8, 512, 256), "Q8_0", 8 * 512 * 272) for part in ("up", "gate")
        )
        spec = replace(QWEN_3_4B, tensors=(*QWEN_3_4B.tensors, *experts), num_experts=8, num_experts_per_token=2)
        plain, mixed = weights_on_device(QWEN_3_4B, request()), weights_on_device(spec, request())
        all_experts = 2 * 8 * 512 * 272
        assert mixed.n_bytes - plain.n_bytes == all_experts
        assert mixed.read_bytes(1) - plain.read_bytes(1) == all_experts / 4
        # 16 tokens that choose 2 of 8 experts each leave an expert unused with a probability of (6 / 8)^16.
        assert mixed.read_bytes(16) - plain.read_bytes(16) == pytest.approx(all_experts * (1 - 0.75**16))
        assert mixed.matrix_read_bytes == {**plain.matrix_read_bytes, "Q8_0": all_experts / 4}
        assert mixed.macs - plain.macs == 2 * 8 * 512 * 256 // 4

    def test_matrices_that_a_step_reads_are_all_that_it_reads_but_vectors(self) -> None:
        """Two norms a layer and the last one; of 32000 x 4096 inputs a step looks up rows."""
        found = weights_on_device(LLAMA_2_7B, request())
        assert set(found.matrix_read_bytes) == {"Q4_K", "Q6_K"}
        assert sum(found.matrix_read_bytes.values()) + 65 * 4096 * 2 == found.read_bytes(1)
        assert found.n_bytes - found.read_bytes(1) == 32000 * 4096 // 256 * 144

    @pytest.mark.parametrize(
        ("kind", "changes", "held"),
        [
            ("Q4_K", {}, {"Q4_K": 64 * 512 // 256 * 144}),
            ("Q3_K", {}, {"Q6_K": 64 * 512 // 256 * 210}),
            ("Q5_1", {}, {"F16": 2 * 64 * 512}),
            ("Q4_K", {"device": "cpu", "dtype": "bfloat16"}, {"BF16": 2 * 64 * 512}),
            ("Q3_K", {"engine": "llama.cpp"}, {"Q3_K": 64 * 512 // 256 * 110}),
            ("Q4_K", {"tensor_parallel": 2}, {"Q4_K": 32 * 512 // 256 * 144}),
        ],
    )
    def test_matrices_are_told_by_the_type_that_is_in_memory(
        self, kind: str, changes: dict[str, object], held: dict[str, int]
    ) -> None:
        """Not by the file's, which kernels of that type never see."""
        tensor = TensorSpec("blk.0.attn_q.weight", (64, 512), kind, 64 * 512 // 256 * 110)
        spec = replace(LLAMA_2_7B, tensors=(tensor,))
        assert weights_on_device(spec, request(**changes)).matrix_read_bytes == held

    def test_matrices_of_safetensors(self) -> None:
        """As they are, or as bitsandbytes makes them, which leaves the vocabulary alone."""
        matrix = TensorSpec("model.layers.0.mlp.up_proj.weight", (4096, 4096), "BF16", 2 * 4096 * 4096)
        head = TensorSpec("lm_head.weight", (4096, 4096), "BF16", 2 * 4096 * 4096)
        spec = replace(LLAMA_2_7B, format="safetensors", tensors=(matrix, head))
        plain, nf4 = (weights_on_device(spec, request(quantization=name)) for name in (None, "bitsandbytes"))
        assert plain.matrix_read_bytes == {"F16": 4 * 4096 * 4096}
        assert nf4.matrix_read_bytes == {"NF4": 4096 * 4096 // 2 + 4096 * 16 * 4 + 4096, "F16": 2 * 4096 * 4096}

    def test_gpus_share_weights_and_heads(self) -> None:
        alone, pair = make_plan(LLAMA_3_8B, P4, request()), make_plan(LLAMA_3_8B, P4, request(tensor_parallel=2))
        assert pair.weights_bytes == -(-alone.weights_bytes // 2)
        assert pair.kv_bytes_per_token * 2 == alone.kv_bytes_per_token


class TestMixtures:
    @pytest.mark.parametrize(("name", "mixture"), sorted(PUBLISHED_BYTES))
    def test_sizes_are_those_of_published_files(self, name: str, mixture: str) -> None:
        """Without the header, which a published file has besides."""
        size = spec_of(SHAPES[name], mixture).weights_bytes
        assert 0 <= PUBLISHED_BYTES[name, mixture] - size <= HEADER_BYTES

    @pytest.mark.parametrize("mixture", MIXTURES)
    @pytest.mark.parametrize("name", ["llama-2-7b", "gemma-3-4b"])
    def test_each_tensor_has_the_type_that_llama_quantize_chooses(self, name: str, mixture: str) -> None:
        found = {tensor.name: tensor.tensor_type for tensor in spec_of(SHAPES[name], mixture).tensors}
        assert found == tensor_types(SHAPES[name], mixture)

    @pytest.mark.parametrize("mixture", MIXTURES)
    def test_a_file_written_so_has_the_same_bytes(self, mixture: str, tmp_path: Path) -> None:
        shape = tiny("llama")
        source = read_model(write_gguf(tmp_path / "source.gguf", shape, "F16", sparse=True))
        target = read_model(write_gguf(tmp_path / "target.gguf", shape, mixture, sparse=True))
        assert requantized(source, mixture).weights_bytes == target.weights_bytes

    def test_rows_that_no_block_divides_fall_back(self) -> None:
        tensors = (TensorSpec("blk.0.ffn_down.weight", (64, 96), "F16", 0), TensorSpec("x", (8, 7), "F16", 0))
        spec = requantized(replace(LLAMA_2_7B, tensors=tensors), "Q4_K_M")
        assert [(tensor.tensor_type, tensor.n_bytes) for tensor in spec.tensors] == [("Q8_0", 64 * 102), ("F16", 112)]


class TestKvCache:
    @pytest.mark.parametrize(
        ("spec", "n_bytes"),
        [(LLAMA_2_7B, 512 * 1024), (LLAMA_3_8B, 128 * 1024), (QWEN_3_4B, 144 * 1024)],
        ids=["llama-2-7b", "llama-3.1-8b", "qwen3-4b"],
    )
    def test_bytes_of_a_token(self, spec: ModelSpec, n_bytes: int) -> None:
        assert kv_bytes_per_token(spec, request()) == n_bytes
        assert kv_bytes_per_token(spec, request(kv_dtype="fp8_e5m2")) == n_bytes // 2

    def test_int8_has_a_scale_per_head_or_per_block(self) -> None:
        assert kv_bytes_per_token(LLAMA_3_8B, request(kv_dtype="int8")) == 32 * 8 * 2 * (128 + 2)
        assert (
            kv_bytes_per_token(LLAMA_3_8B, request(kv_dtype="int8", engine="llama.cpp")) == 32 * 8 * 2 * 128 * 34 // 32
        )

    def test_sglang_pads_by_one_token(self) -> None:
        assert SGLANG.pool_of(LLAMA_3_8B, request(), 1000).n_bytes == 1001 * 128 * 1024

    def test_sglang_gives_sliding_layers_the_whole_pool(self) -> None:
        assert kv_bytes_per_token(GEMMA, request()) == 42 * 8 * 2 * 256 * 2

    def test_llama_cpp_gives_sliding_layers_the_window_and_a_batch(self) -> None:
        pool = LLAMA_CPP.pool_of(GEMMA, request(engine="llama.cpp", context_length=8192, max_running_requests=1))
        assert pool.n_bytes == 21 * 8 * 2 * 256 * 2 * (8192 + 4096 + 512)

    @pytest.mark.parametrize(("context", "cells"), [(1, 256), (256, 256), (257, 512), (4096, 4096)])
    def test_llama_cpp_rounds_cells_up(self, context: int, cells: int) -> None:
        pool = LLAMA_CPP.pool_of(
            LLAMA_3_8B, request(engine="llama.cpp", context_length=context, max_running_requests=3)
        )
        assert pool.n_bytes == 3 * cells * 128 * 1024

    def test_layers_without_attention_store_nothing(self) -> None:
        spec = replace(LLAMA_3_8B, layer_kv_heads=(8, 0) * 16)
        assert kv_bytes_per_token(spec, request()) == 64 * 1024

    def test_mla_stores_one_vector(self) -> None:
        spec = replace(LLAMA_3_8B, kv_lora_rank=512, qk_rope_head_dim=64)
        assert [(group.layers, group.heads) for group in layer_groups(spec)] == [(32, 1)]
        assert kv_bytes_per_token(spec, request()) == 32 * (512 + 64) * 2

    def test_recurrent_layers_have_a_state_per_request(self) -> None:
        """A pure Mamba 2 model of 4 layers: convolution over inner size and groups, and the SSM state, in fp32."""
        spec = replace(
            LLAMA_3_8B, num_hidden_layers=4, layer_kv_heads=(0,) * 4, num_kv_heads=0, ssm_state_size=128,
            ssm_inner_size=2048, ssm_conv_kernel=4, ssm_num_groups=1,
        )  # fmt: skip
        assert recurrent_bytes(spec) == 4 * 4 * (3 * (2048 + 2 * 128) + 128 * 2048)
        assert LLAMA_CPP.pool_of(spec, request(engine="llama.cpp")).n_bytes == 4 * recurrent_bytes(spec)


class TestParts:
    @pytest.mark.parametrize("name", card_names())
    def test_constants_have_an_origin_and_a_source(self, name: str) -> None:
        for engine in ENGINES.values():
            for fact in engine.data.constants(load_card(name)).values():
                assert fact.origin in ("measured", "documented", "estimated")
                assert fact.source
                assert fact.value > 0

    def test_every_part_shows_its_formula(self) -> None:
        for part in make_plan(LLAMA_2_7B, P4, request()).parts:
            assert part.formula
            assert part.origin == "exact" or part.source

    def test_tables_grow_with_requests_and_context(self) -> None:
        one = make_plan(LLAMA_2_7B, P4, request(max_running_requests=1, context_length=4096))
        two = make_plan(LLAMA_2_7B, P4, request(max_running_requests=2, context_length=4096))
        assert two.part("tables") - one.part("tables") == (4096 + 4) * 4

    def test_llama_cpp_holds_the_mlp_of_a_batch_and_the_mask(self) -> None:
        plan = make_plan(LLAMA_3_8B, P4, request(engine="llama.cpp", max_running_requests=1))
        assert plan.part("activations") == 512 * (3 * 14336 + 5 * 4096) * 4 + 512 * 4096 * 2 + 2**20

    def test_llama_cpp_computes_the_logits_of_one_token_a_request(self) -> None:
        changed = request(engine="llama.cpp", max_running_requests=64, context_length=256, chunked_prefill_tokens=32)
        assert make_plan(LLAMA_3_8B, P4, changed).part("activations") == 64 * 128256 * 4 + 2**20
