"""GGUF -> configuration and weights: the model that comes out is the transformers model that went in."""

from __future__ import annotations

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_acceptance.rope import llama3_factors
from sglang_pascal.checkpoint.architectures import ARCHITECTURES
from sglang_pascal.checkpoint.config import model_config, shortest_float
from sglang_pascal.checkpoint.dequantize import dequantized
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.checkpoint.weights import raw_tensors
from sglang_pascal.errors import CheckpointError
from support.models import split_gguf, tiny, write_gguf

NAMES = ["llama", "llama-tied", "llama-linear", "llama-3.2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
PROMPT = torch.tensor([[1, 17, 250, 3, 99, 120, 5, 6, 7, 8, 200, 201, 13, 14, 15, 16, 44, 45, 46, 47]])
"""Longer than the sliding window of the tiny Gemma models."""


def rebuilt(folder, path):
    """The model that the prepared folder describes, with the weights that the loader would hand over."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = dict(dequantized(raw_tensors(GgufFile(path)), torch.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert (missing == ["lm_head.weight"]) == config.tie_word_embeddings
    assert unexpected == []
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_original_model(name, tiny_model, tmp_path):
    tiny = tiny_model(name)
    prepare(tiny.path, tmp_path / "out")
    with torch.no_grad():
        expected = tiny.model(PROMPT).logits
        actual = rebuilt(tmp_path / "out", tiny.path)(PROMPT).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_agrees_with_gguf_py(name, tiny_model):
    """Names, types, shapes and bytes are those that the reference reader sees."""
    path = tiny_model(name).path
    file, reference = GgufFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert (info.tensor_type, info.shape) == (tensor.tensor_type, tuple(int(n) for n in reversed(tensor.shape)))
        assert file.rows(tensor.name).tobytes() == tensor.data.tobytes()
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            assert file.metadata[key] == field.contents()


@pytest.mark.parametrize("tensor_type", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_rows_of_every_type_are_put_back_in_order_before_decoding(tensor_type, build_model, tmp_path):
    """Reordering quantised rows equals quantising the reordered ones."""
    kind = gguf.GGMLQuantizationType[tensor_type]
    tiny = build_model("llama", tmp_path / "model.gguf", tensor_type=kind)
    state = dict(dequantized(raw_tensors(GgufFile(tiny.path)), torch.float32))
    for name, original in tiny.model.state_dict().items():
        if original.ndim == 2:
            expected = gguf.dequantize(gguf.quantize(original.numpy(), kind), kind)
            np.testing.assert_array_equal(state[name].numpy(), expected, err_msg=name)


def test_large_tensors_are_decoded_in_chunks_without_a_seam(monkeypatch, tiny_model):
    monkeypatch.setattr("sglang_pascal.checkpoint.dequantize.CHUNK_BYTES", 7 * 64 * 4)
    tiny = tiny_model("llama")
    state = dict(dequantized(raw_tensors(GgufFile(tiny.path)), torch.float32))
    for name, original in tiny.model.state_dict().items():
        torch.testing.assert_close(state[name], original, atol=0, rtol=0)


def test_weights_come_in_the_asked_type(tiny_model):
    for name, tensor in dequantized(raw_tensors(GgufFile(tiny_model("gemma3").path)), torch.bfloat16):
        assert tensor.dtype == torch.bfloat16, name


class TestConfig:
    def test_floats_are_the_decimals_they_were_made_from(self):
        assert [shortest_float(float(np.float32(x))) for x in (1e-5, 1e-6, 0.1, 5e5)] == [1e-5, 1e-6, 0.1, 5e5]

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_llama3_factors_are_those_of_transformers(self, factor, head_dim):
        parameters = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = transformers.LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1.0 / 500000.0 ** (np.arange(0, head_dim, 2) / head_dim)
        np.testing.assert_allclose(llama3_factors(head_dim, 500000.0, factor), plain / scaled.numpy(), rtol=1e-5)

    def test_frequency_factors_of_another_rule_are_refused(self, build_model, tmp_path, monkeypatch):
        tiny = build_model("llama-3.2", tmp_path / "model.gguf")
        file = GgufFile(tiny.path)
        monkeypatch.setattr(file, "rows", lambda name: np.linspace(1, 40, 16, dtype=np.float32).view(np.uint8))
        with pytest.raises(CheckpointError) as error:
            model_config(file)
        assert str(error.value) == (
            'tensor "rope_freqs.weight" does not follow the Llama 3 rule (largest factor 40.0); '
            "this way of scaling positions is not supported"
        )

    def test_another_architecture_is_refused_with_the_list_of_supported_ones(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(CheckpointError) as error:
            model_config(GgufFile(tmp_path / "m.gguf"))
        assert str(error.value) == (
            'general.architecture is "mamba"; supported are llama, qwen2, qwen3, gemma2, gemma3 '
            "(Mistral files are llama)"
        )

    def test_an_unknown_tensor_is_refused(self):
        with pytest.raises(CheckpointError) as error:
            ARCHITECTURES["llama"].hf_name("blk.0.ffn_gate_exps.weight")
        assert str(error.value) == (
            'tensor "blk.0.ffn_gate_exps.weight" is not part of architecture "llama"; '
            "this variant of it is not supported"
        )


class TestSplitModels:
    """A model of several parts needs all of them."""

    @pytest.fixture
    def parts(self, tiny_model, tmp_path):
        shutil.copy(tiny_model("llama").path, tmp_path / "m.gguf")
        return split_gguf(tmp_path / "m.gguf", 3)

    def error(self, path):
        with pytest.raises(CheckpointError) as error:
            GgufFile(path)
        return str(error.value)

    @pytest.mark.parametrize("named", [0, 1, 2])
    def test_all_parts_are_loaded_whichever_is_named(self, tiny_model, parts, named):
        whole, file = GgufFile(tiny_model("llama").path), GgufFile(parts[named])
        assert (file.path, file.size) == (parts[0], sum(part.stat().st_size for part in parts))
        assert file.metadata.items() >= whole.metadata.items()
        assert file.tensors.keys() == whole.tensors.keys()
        for name in whole.tensors:
            np.testing.assert_array_equal(file.rows(name), whole.rows(name))

    def test_the_weights_are_those_of_the_whole_file(self, tiny_model, parts):
        whole = dict(dequantized(raw_tensors(GgufFile(tiny_model("llama").path)), torch.float32))
        found = dict(dequantized(raw_tensors(GgufFile(parts[1])), torch.float32))
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)

    @pytest.mark.parametrize("part", [0, 1, 2])
    def test_the_header_checksum_depends_on_every_part(self, parts, part):
        before = GgufFile(parts[0]).header_sha256()
        first = next(iter(GgufFile(parts[part]).parts[part].tensors))
        data = parts[part].read_bytes()
        parts[part].write_bytes(data.replace(first.encode(), b"x" * len(first), 1))
        assert GgufFile(parts[0]).header_sha256() != before

    def test_a_missing_part(self, parts):
        parts[2].unlink()
        assert self.error(parts[0]) == (
            f'part 3 of 3 of the split model cannot be read: model file "{parts[2]}" does not exist'
        )

    def test_a_part_in_the_place_of_another(self, parts):
        shutil.copy(parts[0], parts[2])
        assert self.error(parts[0]) == (
            f'"{parts[2]}" is not part 3 of 3 of this split model: its split.no is 0, must be 2; copy or download it again'
        )

    def test_a_part_of_another_model(self, tiny_model, parts, tmp_path):
        (tmp_path / "other").mkdir()
        shutil.copy(tiny_model("qwen3").path, tmp_path / "other/m.gguf")
        shutil.copy(split_gguf(tmp_path / "other/m.gguf", 3)[1], parts[1])
        n_tensors = len(GgufFile(tiny_model("llama").path).tensors)
        others = len(GgufFile(tiny_model("qwen3").path).tensors)
        assert self.error(parts[0]) == (
            f'"{parts[1]}" is a part of another model: its split.tensors.count is {others}, that of "{parts[0]}" is '
            f"{n_tensors}; copy or download it again"
        )

    def test_a_tensor_in_two_parts(self, parts):
        """If the names are unique within each part, only the parts together show it."""
        name = next(iter(GgufFile(parts[0]).parts[1].tensors))
        other = next(iter(GgufFile(parts[0]).parts[2].tensors))
        data = parts[2].read_bytes()
        renamed = struct.pack("<Q", len(other)) + other.encode()
        parts[2].write_bytes(data.replace(renamed, struct.pack("<Q", len(name)) + name.encode(), 1))
        assert self.error(parts[0]).startswith(
            f'tensor "{name}" of a split model is in two parts, "{parts[1]}" and "{parts[2]}"'
        )

    def test_a_part_of_another_quantisation(self, tmp_path):
        folders = {}
        for kind in ("Q8_0", "F16"):
            (tmp_path / kind).mkdir()
            folders[kind] = split_gguf(write_gguf(tmp_path / kind / "m.gguf", tiny("llama"), kind), 2)
        shutil.copy(folders["F16"][1], folders["Q8_0"][1])
        assert self.error(folders["Q8_0"][0]) == (
            f'"{folders["Q8_0"][1]}" does not belong to the other parts: it is of another quantisation: its ffn_down '
            "matrices are F16, those of the parts before it Q8_0; copy or download it again"
        )

    def test_a_renamed_part(self, parts):
        renamed = parts[1].rename(parts[1].with_name("second.gguf"))
        assert self.error(renamed) == (
            f'"{renamed}" is part 2 of 3 of a split model, so its name must end in -00002-of-00003.gguf; give all parts '
            "the names that they were made with"
        )

    def test_a_whole_file_that_is_named_a_part(self, tiny_model, tmp_path):
        path = tmp_path / "m-00001-of-00002.gguf"
        shutil.copy(tiny_model("llama").path, path)
        assert self.error(path) == (
            f'"{path}" is named part 1 of 2, but its header has no split.count; copy or download it again, or rename it '
            "if it is a whole model"
        )


class TestDamagedFiles:
    def error(self, path):
        with pytest.raises(CheckpointError) as error:
            GgufFile(path)
        return str(error.value)

    def test_missing(self, tmp_path):
        path = tmp_path / "none.gguf"
        assert self.error(path) == f'model file "{path}" does not exist'

    @pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip"])
    def test_not_a_gguf_file(self, tmp_path, content):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        assert self.error(path) == f'"{path}" is not a GGUF file: it does not start with "GGUF"'

    def test_every_cut_of_the_header_is_noticed(self, tiny_model, tmp_path):
        data = tiny_model("llama").path.read_bytes()
        path = tmp_path / "cut.gguf"
        end = GgufFile(tiny_model("llama").path).header_bytes
        for length in {*range(4, 64), *range(64, end, 997), end - 1, end}:
            path.write_bytes(data[:length])
            assert self.error(path).startswith(f'"{path}" is damaged or incomplete: ')

    def test_cut_tensor_data_names_the_tensor_and_the_missing_bytes(self, tiny_model, tmp_path):
        path = tmp_path / "cut.gguf"
        source = tiny_model("qwen2").path
        last = list(GgufFile(source).tensors.values())[-1]
        path.write_bytes(source.read_bytes()[: last.data_offset + last.n_bytes - 1])
        assert self.error(path) == (
            f'"{path}" is damaged or incomplete: tensor "{last.name}" ends 1 bytes past the end of the file; '
            "copy or download it again"
        )

    def test_a_version_of_the_future_is_refused(self, tiny_model, tmp_path):
        path = tmp_path / "v9.gguf"
        shutil.copy(tiny_model("llama").path, path)
        with path.open("r+b") as file:
            file.seek(4)
            file.write((9).to_bytes(4, "little"))
        assert self.error(path) == f'"{path}" has GGUF version 9; supported are 2, 3'


def test_config_json_has_the_values_of_the_builtin_model(builtin_gguf):
    config = model_config(GgufFile(builtin_gguf))
    assert {key: config[key] for key in ("model_type", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings")} == {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    json.dumps(config)
