"""GGUF headers: sound files give what the gguf package reads; damaged ones give one clear sentence."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from pascaline.errors import ModelError
from pascaline.models import gguf_header
from pascaline.models.gguf import open_gguf, read_gguf, read_gguf_parts
from pascaline.models.gguf_header import MAX_HEADER_BYTES, read_header
from pascaline.models.gguf_split import AGAIN, whole_name
from support.models import SHAPES, tensor_shapes, tensor_types, tiny, write_gguf
from support.raw_models import LLAMA, MemoryFolder, MemorySource, gguf_file, string, tensor, value

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

EMBEDDING = tensor("token_embd.weight", (256, 4), 12, 0)
EMBEDDING_BYTES = 4 * 144


def read(data: bytes, tail_bytes: int = 0) -> ModelSpec:
    return read_gguf_parts("m.gguf", MemoryFolder({"m.gguf": data}, tail_bytes).open, str)


def refusal(data: bytes, tail_bytes: int = 0) -> str:
    with pytest.raises(ModelError) as raised:
        read(data, tail_bytes)
    return str(raised.value)


class TestSoundFiles:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
    @pytest.mark.parametrize("mixture", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q4_0"])
    def test_every_tensor_is_where_the_gguf_package_finds_it(
        self, tmp_path: Path, architecture: str, mixture: str
    ) -> None:
        path = write_gguf(tmp_path / "model.gguf", tiny(architecture), mixture)
        spec = read_gguf(path)
        theirs = gguf.GGUFReader(path).tensors
        assert [(t.name, t.tensor_type, t.n_bytes, t.data_offset, t.n_elements) for t in spec.tensors] == [
            (t.name, t.tensor_type.name, t.n_bytes, t.data_offset, t.n_elements) for t in theirs
        ]
        assert {t.name: t.shape for t in spec.tensors} == tensor_shapes(tiny(architecture))
        assert {t.name: t.tensor_type for t in spec.tensors} == tensor_types(tiny(architecture), mixture)
        assert (spec.file_type, spec.file_bytes) == (mixture, path.stat().st_size)

    @pytest.mark.parametrize("name", SHAPES)
    def test_the_shape_is_the_models(self, tmp_path: Path, name: str) -> None:
        shape = SHAPES[name]
        path = write_gguf(tmp_path / "model.gguf", shape, "Q4_K_M", sparse=True)
        spec = read_gguf(path)
        for field in (
            "architecture", "name", "num_hidden_layers", "hidden_size", "intermediate_size", "num_heads",
            "num_kv_heads", "head_dim", "vocab_size", "context_length", "sliding_window", "tied_embeddings",
        ):  # fmt: skip
            assert getattr(spec, field) == getattr(shape, field), field
        assert spec.v_head_dim == shape.head_dim
        assert (spec.format, spec.files) == ("gguf", (path,))

    @pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
    def test_every_tensor_type_is_measured(self, kind: gguf.GGMLQuantizationType) -> None:
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        spec = read(gguf_file(LLAMA, [tensor("a", (block * 2, 3), int(kind), 0)], data_bytes=6 * n_bytes))
        assert spec.tensors[0].tensor_type == kind.name
        assert (spec.tensors[0].n_bytes, spec.weights_bytes, spec.n_parameters) == (6 * n_bytes, 6 * n_bytes, 6 * block)

    def test_version_2_is_read(self) -> None:
        assert read(gguf_file(version=2)).architecture == "llama"

    def test_a_file_may_have_no_tensors(self) -> None:
        assert read(gguf_file()).tensors == ()

    def test_data_starts_at_the_files_own_alignment(self) -> None:
        metadata = LLAMA | {"general.alignment": value("uint32", 1024)}
        spec = read(gguf_file(metadata, [EMBEDDING], data_bytes=EMBEDDING_BYTES, alignment=1024))
        assert spec.tensors[0].data_offset == 1024

    def test_the_name_is_decoded_as_utf8(self) -> None:
        assert read(gguf_file(LLAMA | {"general.name": value("string", "Émily 🌍")})).name == "Émily 🌍"


class TestMetadata:
    KINDS = (
        ("uint8", 255), ("int8", -128), ("uint16", 65535), ("int16", -32768), ("uint32", 2**32 - 1),
        ("int32", -(2**31)), ("float32", 0.5), ("bool", True), ("string", "x"), ("uint64", 2**64 - 1),
        ("int64", -(2**63)), ("float64", 0.1),
        ("array", ("string", ["a", "", "c"])), ("array", ("bool", [True, False])), ("array", ("int16", [])),
        ("array", ("array", [("uint8", [1, 2]), ("array", [("string", ["x"])])])),
    )  # fmt: skip

    @pytest.mark.parametrize(("kind", "content"), KINDS)
    def test_each_kind_of_value_is_decoded(self, kind: str, content: object) -> None:
        data = gguf_file({"before": value("uint8", 1), "key": value(kind, content), "after": value("uint16", 2)})
        metadata = read_header(MemorySource("m", data, len(data))).metadata
        assert metadata.value("key") == _elements(content)
        assert (metadata.value("before"), metadata.value("after"), metadata.value("absent")) == (1, 2, None)

    @pytest.mark.parametrize("chunk_bytes", [1, 7, 8, 4096])
    def test_large_values_are_read_again_when_asked_for(self, chunk_bytes: int) -> None:
        tokens = [f"token {i}" * (i % 5) for i in range(2000)]
        data = gguf_file(
            {
                "text": value("string", "y" * 5000),
                "tokens": value("array", ("string", tokens)),
                "scores": value("array", ("float32", [0.5] * 2000)),
            }
        )
        metadata = read_header(MemorySource("m", data, len(data), chunk_bytes)).metadata
        field = metadata.field("tokens")
        assert field is not None
        assert (field.count, field.raw, field.element_type) == (2000, None, "string")
        assert metadata.value("tokens") == tokens
        assert metadata.value("text") == "y" * 5000
        assert metadata.value("scores") == [0.5] * 2000

    def test_large_values_of_an_open_file(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "model.gguf", tiny("qwen2", vocab_size=5000, merges=4000), "Q8_0", sparse=True)
        with open_gguf(path) as header:
            tokens = header.metadata.value("tokenizer.ggml.tokens")
        assert tokens == gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()

    def test_keys_are_listed_in_the_order_of_the_file(self) -> None:
        data = gguf_file()
        assert list(read_header(MemorySource("m", data, len(data))).metadata) == list(LLAMA)


def _elements(content: object) -> object:
    if isinstance(content, tuple):
        return [_elements(element) for element in content[1]]
    return content


class TestArchitectures:
    def _spec(self, architecture: str, **values: bytes) -> ModelSpec:
        metadata = {key.replace("llama", architecture): content for key, content in LLAMA.items()}
        metadata["general.architecture"] = value("string", architecture)
        for key, content in values.items():
            metadata[f"{architecture}.{key.replace('__', '.')}"] = content
        return read(gguf_file(metadata))

    def test_head_dim_is_derived_where_it_is_not_given(self) -> None:
        assert (self._spec("llama").head_dim, self._spec("llama").v_head_dim) == (2, 2)

    def test_head_dim_is_what_the_file_gives(self) -> None:
        spec = self._spec(
            "qwen3", attention__key_length=value("uint32", 16), attention__value_length=value("uint32", 12)
        )
        assert (spec.head_dim, spec.v_head_dim) == (16, 12)

    def test_without_kv_heads_each_head_has_its_own(self) -> None:
        metadata = {key: content for key, content in LLAMA.items() if not key.endswith("head_count_kv")}
        assert read(gguf_file(metadata)).num_kv_heads == 4

    @pytest.mark.parametrize(
        ("architecture", "layers", "sliding"),
        [
            ("gemma2", 4, (0, 2)),
            ("gemma3", 7, (0, 1, 2, 3, 4, 6)),
            ("gpt-oss", 3, (0, 2)),
            ("smallthinker", 5, (1, 2, 3)),
            ("phi3", 4, ()),
            ("some-new-one", 4, ()),
        ],
    )
    def test_sliding_layers_follow_the_architecture(
        self, architecture: str, layers: int, sliding: tuple[int, ...]
    ) -> None:
        spec = self._spec(
            architecture, block_count=value("uint32", layers), attention__sliding_window=value("uint32", 8)
        )
        assert (spec.sliding_layer_ids, spec.sliding_layers) == (sliding, len(sliding))
        assert spec.sliding_window == (8 if sliding else None)

    def test_sliding_layers_follow_the_files_own_pattern(self) -> None:
        pattern = value("array", ("bool", [False, True]))
        window = value("uint32", 8)
        spec = self._spec("mimo2", attention__sliding_window=window, attention__sliding_window_pattern=pattern)
        assert spec.sliding_layer_ids == (1,)
        period = value("uint32", 2)
        spec = self._spec("mimo2", attention__sliding_window=window, attention__sliding_window_pattern=period)
        assert spec.sliding_layer_ids == (0,)

    def test_experts_are_read(self) -> None:
        spec = self._spec(
            "qwen3moe",
            expert_count=value("uint32", 128),
            expert_used_count=value("uint32", 8),
            expert_feed_forward_length=value("uint32", 768),
        )
        assert (spec.num_experts, spec.num_experts_per_token, spec.moe_intermediate_size) == (128, 8, 768)

    def test_mla_is_read_with_the_sizes_before_compression(self) -> None:
        spec = self._spec(
            "deepseek2",
            attention__kv_lora_rank=value("uint32", 512),
            attention__key_length=value("uint32", 576),
            attention__value_length=value("uint32", 512),
            attention__key_length_mla=value("uint32", 192),
            attention__value_length_mla=value("uint32", 128),
            rope__dimension_count=value("uint32", 64),
        )
        assert (spec.kv_lora_rank, spec.qk_rope_head_dim, spec.head_dim, spec.v_head_dim) == (512, 64, 192, 128)

    def test_a_recurrent_model_has_no_heads(self) -> None:
        metadata = {key.replace("llama", "mamba"): content for key, content in LLAMA.items() if "head_count" not in key}
        metadata |= {
            "general.architecture": value("string", "mamba"),
            "mamba.ssm.conv_kernel": value("uint32", 4),
            "mamba.ssm.inner_size": value("uint32", 16),
            "mamba.ssm.state_size": value("uint32", 8),
            "mamba.ssm.time_step_rank": value("uint32", 3),
        }
        spec = read(gguf_file(metadata))
        assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.layer_kv_heads) == (0, 0, 0, None)
        assert (spec.ssm_conv_kernel, spec.ssm_inner_size, spec.ssm_state_size, spec.ssm_num_heads) == (4, 16, 8, 3)

    def test_a_hybrid_says_which_layers_keep_keys(self) -> None:
        heads = value("array", ("int32", [0, 2]))
        spec = self._spec("jamba", attention__head_count_kv=heads, ssm__group_count=value("uint32", 2))
        assert (spec.layer_kv_heads, spec.num_kv_heads, spec.ssm_num_groups) == ((0, 2), 2, 2)
        spec = self._spec("qwen3next", full_attention_interval=value("uint32", 2))
        assert spec.layer_kv_heads == (0, 2)

    def test_layers_that_share_keys_store_none(self) -> None:
        assert self._spec("gemma3n", attention__shared_kv_layers=value("uint32", 1)).layer_kv_heads == (2, 0)

    def test_embeddings_are_tied_where_there_is_no_output_matrix(self) -> None:
        output = tensor("output.weight", (32, 1), 8, 576)
        assert read(gguf_file(LLAMA, [EMBEDDING], data_bytes=576)).tied_embeddings
        assert not read(gguf_file(LLAMA, [EMBEDDING, output], data_bytes=610)).tied_embeddings

    def test_the_vocabulary_is_as_long_as_the_embedding_has_rows(self) -> None:
        tokens = {"tokenizer.ggml.tokens": value("array", ("string", ["a", "b", "c"]))}
        assert read(gguf_file(LLAMA | tokens, [EMBEDDING], data_bytes=576)).vocab_size == 4
        assert read(gguf_file(LLAMA | tokens)).vocab_size == 3
        assert read(gguf_file(LLAMA)).vocab_size == 0

    @pytest.mark.parametrize(("number", "name"), [(15, "Q4_K_M"), (1024 + 18, "Q6_K"), (999, None)])
    def test_the_file_type_is_named(self, number: int, name: str | None) -> None:
        assert read(gguf_file(LLAMA | {"general.file_type": value("uint32", number)})).file_type == name


class TestSplitFiles:
    def _parts(self, **changes: dict[str, bytes]) -> dict[str, bytes]:
        first = LLAMA | {
            "split.no": value("uint16", 0),
            "split.count": value("uint16", 2),
            "split.tensors.count": value("int32", 2),
        }
        second = {"split.no": value("uint16", 1), "split.count": value("uint16", 2)}
        output = tensor("output.weight", (32, 8), 8, 0)
        return {
            "m-00001-of-00002.gguf": gguf_file(first | changes.get("first", {}), [EMBEDDING], data_bytes=576),
            "m-00002-of-00002.gguf": gguf_file(second | changes.get("second", {}), [output], data_bytes=272),
        }

    def _refusal(self, files: dict[str, bytes], name: str = "m-00001-of-00002.gguf") -> str:
        with pytest.raises(ModelError) as raised:
            read_gguf_parts(name, MemoryFolder(files).open, str)
        return str(raised.value)

    @pytest.mark.parametrize("asked", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
    def test_any_part_leads_to_the_whole_model(self, asked: str) -> None:
        files = self._parts()
        spec = read_gguf_parts(asked, MemoryFolder(files).open, str)
        assert [(t.name, t.file_index) for t in spec.tensors] == [("token_embd.weight", 0), ("output.weight", 1)]
        assert spec.files == tuple(files)
        assert spec.file_bytes == sum(map(len, files.values()))

    def test_parts_written_by_the_gguf_package_are_read(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
        for key in ("block_count", "context_length", "embedding_length"):
            writer.add_uint32(f"llama.{key}", 2)
        for name in "abcde":
            writer.add_tensor(name, np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        spec = read_gguf(tmp_path / "m-00002-of-00003.gguf")
        assert [(t.name, t.file_index) for t in spec.tensors] == [("a", 0), ("b", 0), ("c", 1), ("d", 1), ("e", 2)]

    def test_a_missing_part_is_named(self) -> None:
        files = self._parts()
        del files["m-00002-of-00002.gguf"]
        assert self._refusal(files) == (
            "part 2 of 2 of the split model cannot be read: failed to read m-00002-of-00002.gguf: "
            "no such file or directory"
        )

    def test_a_part_that_is_spelt_otherwise_is_shown(self, tmp_path: Path) -> None:
        for name, data in self._parts().items():
            (tmp_path / name.replace("m-00002", "M-00002")).write_bytes(data)
        with pytest.raises(ModelError) as raised:
            read_gguf(tmp_path / "m-00001-of-00002.gguf")
        assert str(raised.value) == (
            f"part 2 of 2 of the split model cannot be read: failed to read {tmp_path}/m-00002-of-00002.gguf: there is no "
            "such file (there is 'M-00002-of-00002.gguf'); put all parts into one folder, under the names that they were "
            "made with"
        )

    def test_a_part_that_is_another_is_refused(self) -> None:
        files = self._parts()
        files["m-00002-of-00002.gguf"] = files["m-00001-of-00002.gguf"]
        assert self._refusal(files) == (
            "failed to read m-00002-of-00002.gguf: its name says part 2 of 2 of the split model, its header part 1; "
            + AGAIN
        )

    def test_parts_that_have_each_others_names_are_refused(self) -> None:
        first, second = self._parts().values()
        files = {"m-00001-of-00002.gguf": second, "m-00002-of-00002.gguf": first}
        assert self._refusal(files) == (
            "failed to read m-00001-of-00002.gguf: its header says that it is part 2 of 2 of a split model, and is "
            "named part 1 of 2: its name must end in -00002-of-00002.gguf; give all parts the names that they were "
            "made with"
        )

    def test_a_part_of_another_split_is_refused(self) -> None:
        files = self._parts(second={"split.count": value("uint16", 3)})
        assert self._refusal(files) == (
            "failed to read m-00002-of-00002.gguf: part 2 of the split model says that there are 3 parts, the named part "
            "says 2; " + AGAIN
        )

    @pytest.mark.parametrize(
        ("key", "content"),
        [
            ("general.architecture", value("string", "qwen2")),
            ("llama.embedding_length", value("uint32", 16)),
            ("split.tensors.count", value("int32", 3)),
        ],
    )
    def test_a_part_of_another_model_is_refused(self, key: str, content: bytes) -> None:
        assert self._refusal(self._parts(second={key: content})) == (
            f"failed to read m-00002-of-00002.gguf: part 2 of 2 of the split model is one of another: its {key!r} is "
            "not that of the first part; " + AGAIN
        )

    def test_a_part_of_a_model_of_another_width_is_refused(self) -> None:
        files = self._parts()
        second = {"split.no": value("uint16", 1), "split.count": value("uint16", 2)}
        norm = tensor("blk.1.ffn_norm.weight", (16,), 0, 0)
        files["m-00002-of-00002.gguf"] = gguf_file(second, [norm], data_bytes=64)
        assert self._refusal(files) == (
            "failed to read m-00002-of-00002.gguf: part 2 of 2 of the split model is one of another: tensor "
            "'blk.1.ffn_norm.weight' has shape [16], must be [8]; " + AGAIN
        )

    def test_a_part_of_another_quantisation_is_refused(self) -> None:
        """Its names, shapes and count are those of the right part, and llama-gguf-split says no more in it."""
        second = {"split.no": value("uint16", 1), "split.count": value("uint16", 2)}
        kinds = ("attn_q", "attn_k", "ffn_up")
        whole = [
            [tensor(f"blk.{layer}.{kind}.weight", (32, 8), 8, 288 * place) for place, kind in enumerate(kinds)]
            for layer in (0, 1)
        ]
        f16 = [tensor(f"blk.1.{kind}.weight", (32, 8), 1, 512 * place) for place, kind in enumerate(kinds)]
        first = LLAMA | {
            "split.no": value("uint16", 0),
            "split.count": value("uint16", 2),
            "split.tensors.count": value("int32", 6),
        }
        files = {"m-00001-of-00002.gguf": gguf_file(first, whole[0], data_bytes=848)}
        sound = files | {"m-00002-of-00002.gguf": gguf_file(second, whole[1], data_bytes=848)}
        assert len(read_gguf_parts("m-00002-of-00002.gguf", MemoryFolder(sound).open, str).tensors) == 6
        assert self._refusal(files | {"m-00002-of-00002.gguf": gguf_file(second, f16, data_bytes=1536)}) == (
            "failed to read m-00002-of-00002.gguf: part 2 of 2 of the split model does not belong to the others: it is "
            "of another quantisation: its attn_q matrices are F16, those of the parts before it Q8_0; " + AGAIN
        )

    @pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00002.GGUF", "m-1-of-2.gguf", "-00001-of-00002.ggu"])
    def test_a_name_that_is_no_parts_name_is_refused(self, name: str) -> None:
        assert self._refusal({name: self._parts()["m-00001-of-00002.gguf"]}, name) == (
            f"failed to read {name}: its header says that it is part 1 of 2 of a split model: its name must end in "
            "-00001-of-00002.gguf; give all parts the names that they were made with"
        )

    @pytest.mark.parametrize("name", ["m-00001-of-00009.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
    def test_a_name_that_speaks_of_other_parts_is_refused(self, name: str) -> None:
        files = self._parts() | {name: self._parts()["m-00001-of-00002.gguf"]}
        part, parts = int(name[2:7]), int(name[11:16])
        assert self._refusal(files, name) == (
            f"failed to read {name}: its header says that it is part 1 of 2 of a split model, and is named part "
            f"{part} of {parts}: its name must end in -00001-of-00002.gguf; give all parts the names that they were "
            "made with"
        )

    def test_a_part_that_is_named_so_and_does_not_say_so_is_refused(self) -> None:
        files = {"m-00001-of-00002.gguf": gguf_file(LLAMA, [EMBEDDING], data_bytes=576)}
        assert self._refusal(files) == (
            "failed to read m-00001-of-00002.gguf: it is named part 1 of 2 of a split model, and its header does not "
            "say so (split.count); bring it here again, or rename it if it is a whole model"
        )

    def test_a_part_without_a_count_is_refused_under_any_name(self) -> None:
        first = gguf_file(LLAMA | {"split.tensors.count": value("int32", 2)}, [EMBEDDING], data_bytes=576)
        assert self._refusal({"m.gguf": first}, "m.gguf") == (
            "failed to read m.gguf: it holds 1 tensors, must be 2 (split.tensors.count): it is a part of a split model; "
            + AGAIN
        )
        second = gguf_file(LLAMA | {"split.no": value("uint16", 1)}, [EMBEDDING], data_bytes=576)
        assert self._refusal({"m.gguf": second}, "m.gguf") == (
            f"failed to read m.gguf: it is part 2 of a split model without split.count; {AGAIN}"
        )

    @pytest.mark.parametrize("count", [0, 1])
    @pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf"])
    def test_a_merged_file_is_whole(self, name: str, count: int) -> None:
        keys = {"split.no": value("uint16", 0), "split.count": value("uint16", count)}
        merged = gguf_file(LLAMA | keys | {"split.tensors.count": value("int32", 1)}, [EMBEDDING], data_bytes=576)
        assert len(read_gguf_parts(name, MemoryFolder({name: merged}).open, str).tensors) == 1

    def test_too_many_parts_are_refused_before_any_is_opened(self) -> None:
        files = self._parts(first={"split.count": value("uint16", 65535)})
        assert self._refusal(files) == (
            "failed to read m-00001-of-00002.gguf: 'split.count' must be between 0 and 1024, got 65535"
        )

    @pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
    def test_a_number_that_is_missing_is_named(self, key: str) -> None:
        head = {
            "split.no": value("uint16", 0),
            "split.count": value("uint16", 2),
            "split.tensors.count": value("int32", 2),
        }
        del head[key]
        files = self._parts()
        files["m-00001-of-00002.gguf"] = gguf_file(LLAMA | head, [EMBEDDING], data_bytes=576)
        assert self._refusal(files) == (
            "failed to read m-00001-of-00002.gguf: it is a part of a split model, and metadata key "
            f"{key!r} is missing; {AGAIN}"
        )

    def test_a_number_of_another_type_is_refused(self) -> None:
        assert self._refusal(self._parts(second={"split.no": value("uint32", 1)})) == (
            f"failed to read m-00002-of-00002.gguf: 'split.no' is a value of type uint32, must be uint16; {AGAIN}"
        )

    def test_a_tensor_in_two_parts_is_refused(self) -> None:
        files = self._parts()
        second = {"split.no": value("uint16", 1), "split.count": value("uint16", 2)}
        files["m-00002-of-00002.gguf"] = gguf_file(second, [EMBEDDING], data_bytes=576)
        assert self._refusal(files) == (
            "failed to read the split model of m-00002-of-00002.gguf: tensor 'token_embd.weight' is in part 1 too; "
            + AGAIN
        )

    def test_tensors_that_are_in_no_part_are_missed(self) -> None:
        files = self._parts(first={"split.tensors.count": value("int32", 3)})
        assert self._refusal(files) == (
            "failed to read the split model of m-00001-of-00002.gguf: the 2 parts hold 2 tensors, must be 3 "
            "(split.tensors.count); " + AGAIN
        )


def test_the_name_of_a_split_model_has_no_part() -> None:
    names = ("emily.Q8_0.gguf", "emily-00002-of-00003.gguf", "emily", "-00001-of-00002.gguf", "emily-1-of-2.gguf")
    assert list(map(whole_name, names)) == ["emily.Q8_0", "emily", "emily", "-00001-of-00002", "emily-1-of-2"]


class TestDamagedFiles:
    def test_empty(self) -> None:
        assert refusal(b"") == "failed to read m.gguf: it is empty; download it again"

    def test_wrong_magic(self) -> None:
        assert refusal(b"PK\x03\x04" + bytes(60)) == (
            "failed to read m.gguf: it is not a GGUF file: it starts with b'PK\\x03\\x04', must start with b'GGUF'"
        )

    def test_a_git_lfs_pointer_is_recognised(self) -> None:
        assert refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n") == (
            "failed to read m.gguf: it is not a GGUF file: it starts with b'vers', must start with b'GGUF'; "
            "it is the pointer of a git-lfs file: run git lfs pull"
        )

    def test_big_endian(self) -> None:
        assert refusal(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)) == (
            "failed to read m.gguf: it is a big-endian GGUF file, must be little-endian; "
            "convert it with llama.cpp's gguf-convert-endian"
        )

    @pytest.mark.parametrize("version", [0, 1, 4])
    def test_other_versions(self, version: int) -> None:
        assert refusal(gguf_file(version=version)) == (
            f"failed to read m.gguf: its GGUF version is {version}, must be 2 or 3; "
            "convert the model again with a current llama.cpp"
        )

    def test_truncated_anywhere_in_the_header(self) -> None:
        """Every prefix of a file is refused, and no prefix of it is taken for the model."""
        tokens = {"tokenizer.ggml.tokens": value("array", ("string", ["a", "bc"]))}
        data = gguf_file(LLAMA | tokens, [EMBEDDING], data_bytes=EMBEDDING_BYTES)
        for length in range(4, len(data)):
            assert "truncated" in refusal(data[:length])

    def test_truncated_data_names_bytes_and_tensor(self) -> None:
        second = tensor("b", (256, 1), 12, 576)
        data = gguf_file(LLAMA, [EMBEDDING, second], data_bytes=576 + 100)
        assert refusal(data) == (
            "failed to read m.gguf: it is truncated: 44 bytes are missing, from tensor 'b' on; download it again"
        )
        assert refusal(data[:-200]) == (
            "failed to read m.gguf: it is truncated: 244 bytes are missing, from tensor 'token_embd.weight' on; "
            "download it again"
        )

    @pytest.mark.parametrize(
        ("count", "what"), [({"tensor_count": 2**60}, "tensors"), ({"key_count": 2**60}, "metadata keys")]
    )
    def test_huge_counts(self, count: dict[str, int], what: str) -> None:
        assert refusal(gguf_file(**count)) == (  # type: ignore[arg-type]  # one keyword, chosen by the case
            f"failed to read m.gguf: it declares {2**60} {what}, must be at most 65536"
        )

    @pytest.mark.parametrize("element_type", [0, 8, 12])
    def test_huge_arrays(self, element_type: int) -> None:
        array = struct.pack("<IIQ", 9, element_type, 2**60)
        message = refusal(gguf_file(LLAMA | {"a": array}))
        assert message.startswith("failed to read m.gguf: it is truncated: 'a' at byte ")

    def test_huge_strings(self) -> None:
        message = refusal(gguf_file(LLAMA | {"a": struct.pack("<IQ", 8, 2**63)}))
        assert message.startswith("failed to read m.gguf: it is truncated: 'a' at byte ")

    def test_a_header_of_many_gigabytes(self) -> None:
        array = struct.pack("<IIQ", 9, 8, 2**30)
        assert refusal(gguf_file(LLAMA | {"a": array}), tail_bytes=2**40) == (
            f"failed to read m.gguf: the header is larger than {MAX_HEADER_BYTES} bytes, the most that is read: "
            "it is not a model"
        )

    def test_many_empty_strings_in_a_sparse_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A count that the limit allows is stepped over, and then the header goes on in zeros."""
        monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
        array = struct.pack("<IIQ", 9, 8, 100_000)
        assert refusal(gguf_file({"a": array}, [], key_count=2), tail_bytes=2**40) == (
            "failed to read m.gguf: metadata key 'general.architecture' is missing"
        )

    def test_names_in_messages_are_escaped(self) -> None:
        """Found by tests/fuzz: a key with a control character stood in the message as it was."""
        array = struct.pack("<IIQ", 9, 0, 100)
        message = refusal(gguf_file({"a\0\x1b[31m": array}))
        assert message.startswith("failed to read m.gguf: it is truncated: 'a\\x00\\x1b[31m' at byte ")

    def test_names_in_tables_obey_no_terminal(self) -> None:
        """A name is shown in tables, and in pictures where a control character would break the file."""
        found = read(gguf_file(LLAMA | {"general.name": value("string", "a\x1b[31m\nb\0\u202ec")}))
        assert found.name == "a\ufffd[31m\ufffdb\ufffd\ufffdc"

    def test_nested_arrays_have_a_limit(self) -> None:
        nested: object = ("uint8", [1])
        for _ in range(5):
            nested = ("array", [nested])
        assert refusal(gguf_file(LLAMA | {"a": value("array", nested)})) == (
            "failed to read m.gguf: metadata key 'a' nests arrays more than 4 deep"
        )

    def test_nested_arrays_are_counted(self) -> None:
        """A header of a few MiB must not cost millions of steps."""
        huge = struct.pack("<IIQ", 9, 9, 2**60)
        assert refusal(gguf_file(LLAMA | {"a": huge})) == (
            "failed to read m.gguf: metadata key 'a' holds more than 65536 arrays"
        )
        inner = ("array", [("uint8", [])] * 40_000)
        assert refusal(gguf_file(LLAMA | {"a": value("array", ("array", [inner, inner]))})) == (
            "failed to read m.gguf: metadata key 'a' holds more than 65536 arrays"
        )

    def test_a_key_that_is_not_utf8(self) -> None:
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string(b"k\xff") + value("uint8", 1)
        assert (
            refusal(data) == "failed to read m.gguf: metadata key b'k\\xff' at byte 32 is not UTF-8: invalid start byte"
        )

    def test_a_value_that_is_not_utf8(self) -> None:
        name = struct.pack("<I", 8) + string(b"\xc3(")
        data = gguf_file(LLAMA | {"general.name": name})
        at = data.index(b"\xc3(")
        assert refusal(data) == (
            f"failed to read m.gguf: the value of 'general.name' b'\\xc3(' at byte {at} is not UTF-8: "
            "invalid continuation byte"
        )

    def test_a_tensor_name_that_is_not_utf8(self) -> None:
        message = refusal(gguf_file(LLAMA, [tensor(b"\x80", (32,), 0, 0)], data_bytes=128))
        assert message.startswith("failed to read m.gguf: tensor name b'\\x80' at byte ")

    def test_a_key_that_is_too_long(self) -> None:
        message = refusal(gguf_file({"k" * 65536: value("uint8", 1)}))
        assert message == "failed to read m.gguf: metadata key at byte 32 has 65536 bytes, must be at most 65535"

    def test_a_long_name_is_cut_in_the_message(self) -> None:
        message = refusal(gguf_file(LLAMA, [tensor("n" * 5000, (0,), 0, 0)]))
        assert message == f"failed to read m.gguf: tensor '{'n' * 80}...' has shape (0,), must have no dimension of 0"

    def test_a_key_that_is_there_twice(self) -> None:
        data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (string("k") + value("uint8", 1)) * 2
        assert refusal(data) == "failed to read m.gguf: metadata key 'k' is there twice"

    def test_an_unknown_value_type(self) -> None:
        assert refusal(gguf_file({"k": struct.pack("<IQ", 13, 0)})) == (
            "failed to read m.gguf: metadata key 'k' has value type 13, must be 0 to 12"
        )

    @pytest.mark.parametrize(
        ("kind", "content", "text"),
        [("uint32", 0, "0"), ("uint32", 48, "48"), ("uint64", 32, "32"), ("string", "x", "'x'")],
    )
    def test_bad_alignment(self, kind: str, content: object, text: str) -> None:
        assert refusal(gguf_file(LLAMA | {"general.alignment": value(kind, content)})) == (
            f"failed to read m.gguf: general.alignment is {text}, must be a power of two stored as uint32"
        )

    @pytest.mark.parametrize(
        ("entry", "cause"),
        [
            (tensor("t", (32, 0), 0, 0), "tensor 't' has shape (0, 32), must have no dimension of 0"),
            (tensor("t", (), 0, 0), "tensor 't' has 0 dimensions, must be between 1 and 4"),
            (tensor("t", (1,) * 5, 0, 0), "tensor 't' has 5 dimensions, must be between 1 and 4"),
            (tensor("t", (33,), 8, 0), "tensor 't' has rows of 33 weights, must be a multiple of 32 (Q8_0)"),
            (tensor("t", (32,), 0, 31), "tensor 't' starts at 31, must be a multiple of 32"),
            (
                tensor("t", (32,), 4, 0),
                "tensor 't' has type 4 (Q4_2), which ggml no longer has; convert the model again",
            ),
            (
                tensor("t", (32,), 1000, 0),
                "tensor 't' has type 1000, which is not one of ggml's: "
                "the file is damaged, or made for a newer version",
            ),
            (
                tensor("t", (2**32, 2**32), 0, 0),
                "tensor 't' of shape (4294967296, 4294967296) at 0 is larger than any file",
            ),
            (tensor("t", (32,), 0, 2**63), f"tensor 't' of shape (32,) at {2**63} is larger than any file"),
        ],
    )
    def test_bad_tensors(self, entry: bytes, cause: str) -> None:
        assert refusal(gguf_file(LLAMA, [entry], data_bytes=4096)) == f"failed to read m.gguf: {cause}"

    def test_overlapping_tensors(self) -> None:
        first, second = tensor("a", (256,), 0, 0), tensor("b", (256,), 0, 512)
        assert refusal(gguf_file(LLAMA, [first, second], data_bytes=4096)) == (
            "failed to read m.gguf: tensors 'a' and 'b' overlap"
        )

    def test_two_tensors_of_one_name(self) -> None:
        first, second = tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)
        assert refusal(gguf_file(LLAMA, [first, second], data_bytes=64)) == (
            "failed to read m.gguf: two tensors are named 'a'"
        )

    @pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length"])
    def test_missing_keys(self, key: str) -> None:
        metadata = {name: content for name, content in LLAMA.items() if name != f"llama.{key}"}
        assert refusal(gguf_file(metadata)) == f"failed to read m.gguf: metadata key 'llama.{key}' is missing"

    def test_missing_architecture(self) -> None:
        assert refusal(gguf_file({})) == "failed to read m.gguf: metadata key 'general.architecture' is missing"

    @pytest.mark.parametrize(
        ("kind", "content", "cause"),
        [
            ("uint32", 0, "must be between 1 and 512, got 0"),
            ("uint32", 513, "must be between 1 and 512, got 513"),
            ("int64", -1, "must be between 1 and 512, got -1"),
            ("float32", 2.0, "must be between 1 and 512, got 2.0"),
            ("bool", True, "must be between 1 and 512, got True"),
            ("string", "2", "is a value of type string, must be a whole number"),
            ("array", ("uint8", [2]), "is a value of type array, must be a whole number"),
        ],
    )
    def test_numbers_out_of_range(self, kind: str, content: object, cause: str) -> None:
        assert refusal(gguf_file(LLAMA | {"llama.block_count": value(kind, content)})) == (
            f"failed to read m.gguf: 'llama.block_count' {cause}"
        )

    def test_a_number_per_layer_must_be_there_for_each(self) -> None:
        heads = value("array", ("uint32", [1, 2, 3]))
        assert refusal(gguf_file(LLAMA | {"llama.attention.head_count_kv": heads})) == (
            "failed to read m.gguf: 'llama.attention.head_count_kv' has 3 elements, must have one for each of 2 layers"
        )

    @pytest.mark.parametrize(
        ("key", "content", "what"),
        [
            ("general.type", "mmproj", "the projector of a vision model (general.type mmproj)"),
            ("general.type", "adapter", "a LoRA adapter (general.type adapter)"),
            ("general.type", "imatrix", "an importance matrix (general.type imatrix)"),
            ("general.type", "vocab", "something of type 'vocab' (general.type vocab)"),
            ("adapter.type", "lora", "a LoRA adapter (adapter.type)"),
            ("general.architecture", "clip", "the projector of a vision model (general.architecture clip)"),
            ("general.architecture", "imatrix", "an importance matrix (general.architecture imatrix)"),
            ("general.architecture", "controlvector", "a control vector (general.architecture controlvector)"),
        ],
    )
    def test_what_belongs_to_a_model_is_none(self, key: str, content: str, what: str) -> None:
        assert refusal(gguf_file(LLAMA | {key: value("string", content)})) == (
            f"failed to read m.gguf: it holds {what}, must be a model"
        )

    def test_names_of_other_types(self) -> None:
        assert refusal(gguf_file(LLAMA | {"general.name": value("uint8", 1)})) == (
            "failed to read m.gguf: general.name is 1, must be a string"
        )
        assert refusal(gguf_file(LLAMA | {"general.architecture": value("string", "x" * 5000)})) == (
            "failed to read m.gguf: general.architecture is longer than a name can be"
        )


def test_tensor_data_is_never_read(tmp_path: Path) -> None:
    """The reads of a file stop where its header stops, up to one chunk."""
    path = write_gguf(tmp_path / "m.gguf", SHAPES["llama-2-7b"], "Q4_K_M", sparse=True)
    size = path.stat().st_size
    reads: list[int] = []

    class Recorder(MemorySource):
        def read_at(self, offset: int, count: int) -> bytes:
            reads.append(offset + count)
            with path.open("rb") as file:
                return os.pread(file.fileno(), count, offset)

    header = read_header(Recorder(str(path), b"", size))
    first = min(tensor.data_offset for tensor in header.tensors)
    assert max(reads) <= first + Recorder.chunk_bytes
