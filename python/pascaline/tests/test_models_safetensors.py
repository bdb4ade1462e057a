"""Hugging Face folders: sound ones of many families, and damaged ones that give one clear sentence."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ModelError
from pascaline.models.json_file import MAX_CONTAINERS, MAX_JSON_BYTES
from pascaline.models.safetensors import DTYPE_BITS, INDEX_NAME, read_header, read_safetensors, read_safetensors_parts
from support.raw_models import CONFIG, MemoryFolder, MemorySource, safetensors_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

EMBEDDING = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [16, 8], "data_offsets": [0, 256]}}
HEAD = {"lm_head.weight": {"dtype": "F16", "shape": [16, 8], "data_offsets": [256, 512]}}

DTYPES = ", ".join(DTYPE_BITS)
AGAIN = "download the folder again (git lfs pull, if it was cloned by git)"
LIST = "the shape of tensor 't' must be a list of at most 8 numbers"
WHOLE = "the shape of tensor 't' must hold whole numbers from 0 to 2^63 - 1"


def read_config(config: Mapping[str, object], header: object = EMBEDDING) -> ModelSpec:
    """Read a folder of one small file with this config.json."""
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors_file(header, data_bytes=data_bytes(header)),
    }
    return read_safetensors_parts("some/tiny", MemoryFolder(files).open, str, ["model.safetensors"])


def data_bytes(header: object) -> int:
    """As many bytes as the tensors take."""
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)  # type: ignore[attr-defined]


def header_refusal(data: bytes, size: int | None = None) -> str:
    with pytest.raises(ModelError) as raised:
        read_header(MemorySource("m.safetensors", data, len(data) if size is None else size))
    return str(raised.value)


class TestHeader:
    @pytest.mark.parametrize(("dtype", "bits"), DTYPE_BITS.items())
    def test_every_dtype_is_measured(self, dtype: str, bits: int) -> None:
        header = {"t": {"dtype": dtype, "shape": [8, 3], "data_offsets": [0, 3 * bits]}}
        data = safetensors_file(header, data_bytes=3 * bits)
        (tensor,) = read_header(MemorySource("m", data, len(data)))
        assert (tensor.tensor_type, tensor.shape, tensor.n_bytes, tensor.n_elements) == (dtype, (8, 3), 3 * bits, 24)
        assert tensor.data_offset == len(data) - 3 * bits

    def test_scalars_and_empty_tensors_are_read(self) -> None:
        header = {
            "__metadata__": {"format": "pt"},
            "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [4, 4]},
        }
        data = safetensors_file(header, data_bytes=4)
        tensors = read_header(MemorySource("m", data, len(data)))
        assert [(t.name, t.n_elements, t.n_bytes) for t in tensors] == [("scalar", 1, 4), ("empty", 0, 0)]

    @pytest.mark.parametrize("size", [0, 7])
    def test_shorter_than_its_length(self, size: int) -> None:
        assert header_refusal(bytes(size)) == (
            f"failed to read m.safetensors: it is truncated: it has {size} bytes, "
            "the length of its header alone needs 8; download it again"
        )

    def test_a_header_larger_than_the_file(self) -> None:
        assert header_refusal(safetensors_file(b"{}", length=10)) == (
            "failed to read m.safetensors: it is truncated: 8 bytes of its header are missing; download it again"
        )

    @pytest.mark.parametrize("length", [MAX_JSON_BYTES + 1, 2**60, 2**64 - 1])
    def test_a_header_larger_than_the_limit(self, length: int) -> None:
        assert header_refusal(safetensors_file(b"{}", length=length)) == (
            f"failed to read m.safetensors: its header has {length} bytes, at most {MAX_JSON_BYTES} are read: "
            "it is not safetensors"
        )

    def test_truncated_data_names_bytes_and_tensor(self) -> None:
        assert header_refusal(safetensors_file(EMBEDDING | HEAD, data_bytes=400)) == (
            "failed to read m.safetensors: it is truncated: 112 bytes are missing, from tensor 'lm_head.weight' on; "
            "download it again"
        )

    def test_truncated_anywhere_in_the_header(self) -> None:
        data = safetensors_file(EMBEDDING)
        for length in range(len(data)):
            assert "it is truncated" in header_refusal(data[:length])

    def test_overlapping_tensors(self) -> None:
        overlapping = {"lm_head.weight": {"dtype": "F16", "shape": [16, 8], "data_offsets": [255, 511]}}
        assert header_refusal(safetensors_file(EMBEDDING | overlapping, data_bytes=512)) == (
            "failed to read m.safetensors: tensors 'model.embed_tokens.weight' and 'lm_head.weight' overlap"
        )

    @pytest.mark.parametrize(
        ("entry", "cause"),
        [
            ([], "tensor 't' is not described by an object"),
            (
                {"shape": [], "data_offsets": [0, 0]},
                f"the dtype of tensor 't' is missing or not a string, must be one of {DTYPES}",
            ),
            (
                {"dtype": "Q4_K", "shape": [], "data_offsets": [0, 0]},
                f"the dtype of tensor 't' is 'Q4_K', must be one of {DTYPES}",
            ),
            ({"dtype": "F16", "shape": 4, "data_offsets": [0, 8]}, LIST),
            ({"dtype": "F16", "shape": [1] * 9, "data_offsets": [0, 2]}, LIST),
            ({"dtype": "F16", "shape": [-1], "data_offsets": [0, 8]}, WHOLE),
            ({"dtype": "F16", "shape": [1.0], "data_offsets": [0, 2]}, WHOLE),
            ({"dtype": "F16", "shape": [True], "data_offsets": [0, 2]}, WHOLE),
            ({"dtype": "F16", "shape": [2**63], "data_offsets": [0, 2]}, WHOLE),
            ({"dtype": "F16", "shape": [4]}, "data_offsets of tensor 't' must be a list of at most 2 numbers"),
            (
                {"dtype": "F16", "shape": [4], "data_offsets": [0]},
                "tensor 't' of shape [4] in F16 needs 8 bytes, its data_offsets are [0]",
            ),
            (
                {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]},
                "tensor 't' of shape [4] in F16 needs 8 bytes, its data_offsets are [8, 0]",
            ),
            (
                {"dtype": "F16", "shape": [4], "data_offsets": [0, 9]},
                "tensor 't' of shape [4] in F16 needs 8 bytes, its data_offsets are [0, 9]",
            ),
        ],
    )
    def test_bad_entries(self, entry: object, cause: str) -> None:
        data = safetensors_file({"t": entry}, data_bytes=16)
        assert header_refusal(data) == f"failed to read m.safetensors: {cause}"

    @pytest.mark.parametrize(
        ("header", "cause"),
        [
            (b"[]", "it is not a JSON object"),
            (b"{", "it is not sound JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
            (b'{"a": NaN}', "it is not sound JSON: NaN is not a JSON number"),
            (b'{"a": 1, "a": 2}', "it is not sound JSON: key 'a' is there twice"),
            (b'{"\xff": 1}', "it is not UTF-8 at byte 2"),
            (b"[" * 100_000, "its JSON is nested too deep"),
            (b'{"a": ' * 100_000, "its JSON is nested too deep"),
            ("{}".encode("utf-16"), "it is not UTF-8 at byte 0"),
            (
                b"[],\n" * (MAX_CONTAINERS + 1),
                f"it has {4 * (MAX_CONTAINERS + 1)} bytes and {MAX_CONTAINERS + 1} objects and lists, "
                f"at most {MAX_JSON_BYTES} and {MAX_CONTAINERS} are read",
            ),
        ],
        ids=["list", "broken", "nan", "twice", "not-utf8", "deep-list", "deep-object", "utf16", "many"],
    )
    def test_bad_json(self, header: bytes, cause: str) -> None:
        assert header_refusal(safetensors_file(header)) == f"failed to read the header of m.safetensors: {cause}"

    def test_a_number_of_many_digits(self) -> None:
        message = header_refusal(safetensors_file(b'{"a": ' + b"9" * 5000 + b"}"))
        assert message.startswith("failed to read the header of m.safetensors: it is not sound JSON: Exceeds the limit")


class TestConfig:
    def test_a_llama(self) -> None:
        spec = read_config(CONFIG, EMBEDDING | HEAD)
        assert (spec.format, spec.architecture, spec.name, spec.files) == (
            "safetensors",
            "llama",
            "tiny",
            ("model.safetensors",),
        )
        assert (spec.num_hidden_layers, spec.hidden_size, spec.intermediate_size) == (2, 8, 16)
        assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == (4, 2, 2, 2)
        assert (spec.vocab_size, spec.context_length, spec.tied_embeddings) == (16, 64, False)
        assert (spec.weights_bytes, spec.n_parameters) == (512, 256)

    def test_kv_heads_are_heads_where_they_are_not_given(self) -> None:
        assert read_config({**CONFIG, "num_key_value_heads": None}).num_kv_heads == 4

    def test_head_dim_is_what_the_file_gives(self) -> None:
        spec = read_config({**CONFIG, "head_dim": 32})
        assert (spec.head_dim, spec.v_head_dim) == (32, 32)

    @pytest.mark.parametrize(
        ("header", "flag", "tied"),
        [
            (EMBEDDING, None, True),
            (EMBEDDING, False, True),
            (EMBEDDING | HEAD, None, False),
            (EMBEDDING | HEAD, True, True),
        ],
    )
    def test_tied_embeddings(self, header: object, flag: bool | None, tied: bool) -> None:
        assert read_config({**CONFIG, "tie_word_embeddings": flag}, header).tied_embeddings is tied

    def test_a_multimodal_gemma3_names_only_what_differs(self) -> None:
        """google/gemma-3-4b-it leaves heads, vocabulary and context to transformers' defaults."""
        text = {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        }
        spec = read_config({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
        assert (spec.architecture, spec.num_hidden_layers, spec.hidden_size) == ("gemma3", 34, 2560)
        assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
        assert (spec.vocab_size, spec.context_length, spec.tied_embeddings) == (262208, 131072, True)
        assert (spec.sliding_window, spec.sliding_layers) == (1024, 29)
        assert spec.sliding_layer_ids[:6] == (0, 1, 2, 3, 4, 6)

    @pytest.mark.parametrize(
        ("changes", "sliding"),
        [
            ({"sliding_window": 8}, (0, 1)),
            ({"sliding_window": None}, ()),
            ({"sliding_window": 8, "use_sliding_window": False}, ()),
            ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, (1,)),
            ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, (1,)),
            ({"sliding_window": 8, "sliding_window_pattern": 2}, (0,)),
            ({"sliding_window": 8, "model_type": "gemma2"}, (0,)),
        ],
    )
    def test_sliding_layers(self, changes: dict[str, object], sliding: tuple[int, ...]) -> None:
        spec = read_config(CONFIG | changes)
        assert (spec.sliding_layer_ids, spec.sliding_layers) == (sliding, len(sliding))
        assert spec.sliding_window == (8 if sliding else None)

    @pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
    def test_experts(self, name: str) -> None:
        spec = read_config(CONFIG | {name: 64, "num_experts_per_tok": 6, "moe_intermediate_size": 4})
        assert (spec.num_experts, spec.num_experts_per_token, spec.moe_intermediate_size) == (64, 6, 4)

    def test_mla(self) -> None:
        mla = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        spec = read_config(CONFIG | mla)
        assert (spec.kv_lora_rank, spec.qk_rope_head_dim, spec.head_dim, spec.v_head_dim) == (512, 64, 192, 128)

    def test_mamba(self) -> None:
        config = {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "state_size": 4}
        spec = read_config(config | {"conv_kernel": 3, "intermediate_size": 16})
        assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.context_length) == (0, 0, 0, 0)
        assert (spec.ssm_state_size, spec.ssm_conv_kernel, spec.ssm_inner_size) == (4, 3, 16)

    def test_hybrids_say_which_layers_keep_keys(self) -> None:
        linear = {"linear_num_value_heads": 4, "linear_value_head_dim": 8, "linear_key_head_dim": 2}
        spec = read_config(CONFIG | linear | {"layer_types": ["linear_attention", "full_attention"]})
        assert (spec.layer_kv_heads, spec.num_kv_heads, spec.ssm_inner_size, spec.ssm_num_heads) == ((0, 2), 2, 32, 4)
        assert read_config(CONFIG | {"full_attention_interval": 2}).layer_kv_heads == (0, 2)
        assert read_config(CONFIG | {"num_kv_shared_layers": 1}).layer_kv_heads == (2, 0)

    def test_gpt2_has_its_own_names(self) -> None:
        config = {"model_type": "gpt2", "n_layer": 3, "n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 16}
        spec = read_config(config)
        assert (spec.num_hidden_layers, spec.hidden_size, spec.num_heads, spec.intermediate_size) == (3, 8, 2, 32)
        assert (spec.num_kv_heads, spec.head_dim, spec.context_length, spec.tied_embeddings) == (2, 4, 32, True)

    @pytest.mark.parametrize(
        ("changes", "cause"),
        [
            ({"hidden_size": None}, "hidden_size or n_embd or d_model is missing"),
            ({"vocab_size": None}, "vocab_size is missing"),
            ({"num_hidden_layers": 0}, "num_hidden_layers or n_layer or num_layers or n_layers is missing"),
            ({"num_hidden_layers": 1025}, "num_hidden_layers must be between 0 and 1024, got 1025"),
            ({"hidden_size": -1}, "hidden_size must be between 0 and 2147483647, got -1"),
            ({"hidden_size": 2**31}, "hidden_size must be between 0 and 2147483647, got 2147483648"),
            ({"hidden_size": 8.0}, "hidden_size must be between 0 and 2147483647, got 8.0"),
            ({"hidden_size": True}, "hidden_size must be between 0 and 2147483647, got True"),
            ({"hidden_size": "8\x1b"}, "hidden_size must be between 0 and 2147483647, got '8\\x1b'"),
            ({"hidden_size": [8]}, "hidden_size must be between 0 and 2147483647, got a list"),
            ({"model_type": 3}, "model_type is 3, must be a string"),
            ({"text_config": 3}, "text_config is 3, must be an object"),
            ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', must be true or false"),
            ({"layer_types": ["x"]}, "layer_types must be a list of 2 strings, one for each layer"),
            ({"layer_types": [1, 2]}, "layer_types must be a list of 2 strings, one for each layer"),
        ],
    )
    def test_bad_values(self, changes: dict[str, object], cause: str) -> None:
        header = EMBEDDING | HEAD
        with pytest.raises(ModelError) as raised:
            read_config(CONFIG | changes, header)
        assert str(raised.value) == f"failed to read config.json: {cause}"


class TestFolder:
    def _write(self, folder: Path, files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder

    def _refusal(self, folder: Path) -> str:
        with pytest.raises(ModelError) as raised:
            read_safetensors(folder)
        return str(raised.value).replace(str(folder), "FOLDER")

    def _shards(self) -> dict[str, bytes]:
        index = {"weight_map": {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
        head = {"lm_head.weight": {"dtype": "F16", "shape": [16, 8], "data_offsets": [0, 256]}}
        return {
            "config.json": json.dumps(CONFIG).encode(),
            INDEX_NAME: json.dumps(index).encode(),
            "a.safetensors": safetensors_file(EMBEDDING, data_bytes=256),
            "b.safetensors": safetensors_file(head, data_bytes=256),
            "left-over.safetensors": b"not in the index",
        }

    def test_shards_are_those_of_the_index(self, tmp_path: Path) -> None:
        spec = read_safetensors(self._write(tmp_path, self._shards()))
        assert [(t.name, t.file_index) for t in spec.tensors] == [
            ("model.embed_tokens.weight", 0),
            ("lm_head.weight", 1),
        ]
        assert spec.files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
        assert spec.file_bytes == sum(file.stat().st_size for file in tmp_path.glob("[ab].safetensors"))

    def test_without_an_index_all_files_count_but_consolidated_ones(self, tmp_path: Path) -> None:
        files = self._shards()
        del files[INDEX_NAME], files["left-over.safetensors"]
        spec = read_safetensors(self._write(tmp_path, files | {"consolidated.safetensors": files["a.safetensors"]}))
        assert spec.files == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        files = self._shards()
        del files["b.safetensors"]
        assert self._refusal(self._write(tmp_path, files)) == (
            "one of the model's 2 shards cannot be read: failed to read FOLDER/b.safetensors: there is no such file; "
            + AGAIN
        )

    def test_a_tensor_in_two_shards(self, tmp_path: Path) -> None:
        files = self._shards()
        files["b.safetensors"] = files["a.safetensors"]
        assert self._refusal(self._write(tmp_path, files)) == (
            "failed to read FOLDER: tensor 'model.embed_tokens.weight' is in 'a.safetensors' and in 'b.safetensors'; "
            + AGAIN
        )

    def test_an_index_that_names_what_no_shard_holds(self, tmp_path: Path) -> None:
        places = {"model.embed_tokens.weight": "a.safetensors", "lm_head.weight": "a.safetensors", "x": "a.safetensors"}
        files = self._shards() | {INDEX_NAME: json.dumps({"weight_map": places}).encode()}
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER: no shard holds 2 of the 3 tensors that {INDEX_NAME} names: 'lm_head.weight', 'x'; "
            + AGAIN
        )

    @pytest.mark.parametrize("indexed", [True, False])
    def test_a_shard_that_the_others_names_speak_of(self, tmp_path: Path, indexed: bool) -> None:
        name = "model-00001-of-00002.safetensors"
        files = {"config.json": json.dumps(CONFIG).encode(), name: safetensors_file(EMBEDDING, data_bytes=256)}
        if indexed:
            files[INDEX_NAME] = json.dumps({"weight_map": {"model.embed_tokens.weight": name}}).encode()
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER: {name!r} is there, or in the index, and 'model-00002-of-00002.safetensors' is not; "
            + AGAIN
        )

    @pytest.mark.parametrize("name", ["b.safetensors", "config.json", INDEX_NAME, "tokenizer.json", "tokenizer.model"])
    def test_a_pointer_of_git_lfs(self, tmp_path: Path, name: str) -> None:
        """In a folder that was cloned without git-lfs each large file is one."""
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4368438944\n"
        shard = "one of the model's 2 shards cannot be read: " if name == "b.safetensors" else ""
        assert self._refusal(self._write(tmp_path, self._shards() | {name: pointer})) == (
            f"{shard}failed to read FOLDER/{name}: it is the pointer of a git-lfs file: run git lfs pull"
        )

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"<!DOCTYPE html><html>", "a web page, which a server sent in place of the file"),
            (b"\n  <HTML lang=en>", "a web page, which a server sent in place of the file"),
            (b"Entry not found", "the text 'Entry not found', which a server may have sent in place of the file"),
        ],
    )
    @pytest.mark.parametrize("name", ["b.safetensors", "config.json"])
    def test_what_a_server_sent_in_place_of_a_file(self, tmp_path: Path, name: str, content: bytes, what: str) -> None:
        assert self._refusal(self._write(tmp_path, self._shards() | {name: content})).endswith(
            f"failed to read FOLDER/{name}: it is {what}: download it again; if the server asks for a login, with a "
            "token (pascaline models add --token-file FILE)"
        )

    @pytest.mark.parametrize(
        ("name", "content", "what"),
        [
            ("tokenizer.json", b"", "empty"),
            ("tokenizer.json", b"<!DOCTYPE html><html>", "a web page, which a server sent in place of the file"),
            (
                "tokenizer.json",
                b"Access denied",
                "the text 'Access denied', which a server may have sent in place of the file",
            ),
            ("tokenizer.json", b"\0\1", "not JSON"),
            ("tokenizer.model", b"\n<html>", "a web page, which a server sent in place of the file"),
            ("tokenizer.model", b"", "empty"),
        ],
    )
    def test_what_stands_in_place_of_a_tokenizer(self, tmp_path: Path, name: str, content: bytes, what: str) -> None:
        assert self._refusal(self._write(tmp_path, self._shards() | {name: content})) == (
            f"failed to read FOLDER/{name}: it is {what}: download it again; if the server asks for a login, with a "
            "token (pascaline models add --token-file FILE)"
        )

    def test_a_tokenizer_of_any_bytes_is_not_judged(self, tmp_path: Path) -> None:
        files = {"tokenizer.model": b"\n\x0e\n\x05<unk>", "merges.txt": b"#version: 0.2\n", "vocab.json": b" {"}
        read_safetensors(self._write(tmp_path, self._shards() | files))

    def test_bytes_of_no_tensor(self, tmp_path: Path) -> None:
        files = self._shards()
        files["b.safetensors"] += b"\0\0"
        assert self._refusal(self._write(tmp_path, files)) == (
            "one of the model's 2 shards cannot be read: failed to read FOLDER/b.safetensors: 2 bytes at its end belong "
            "to no tensor; " + AGAIN
        )
        gap = {"lm_head.weight": {"dtype": "F16", "shape": [16, 8], "data_offsets": [8, 264]}}
        files["b.safetensors"] = safetensors_file(gap, data_bytes=264)
        assert self._refusal(self._write(tmp_path, files)) == (
            "one of the model's 2 shards cannot be read: failed to read FOLDER/b.safetensors: 8 bytes before tensor "
            "'lm_head.weight' belong to none; " + AGAIN
        )

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin", "", 3, "a\x00.safetensors"])
    def test_a_shard_outside_the_folder(self, tmp_path: Path, name: object) -> None:
        files = self._shards() | {INDEX_NAME: json.dumps({"weight_map": {"t": name}}).encode()}
        shown = ascii(name if isinstance(name, str) else "")
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER/{INDEX_NAME}: {shown} is not the name of a safetensors file beside it"
        )

    def test_the_name_of_a_shard_has_a_limit(self, tmp_path: Path) -> None:
        """Found by tests/fuzz: a name of thousands of characters made a message of thousands."""
        files = self._shards() | {INDEX_NAME: json.dumps({"weight_map": {"t": "[" * 3000 + ".safetensors"}}).encode()}
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER/{INDEX_NAME}: '{'[' * 80}...' is not the name of a safetensors file beside it"
        )

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
    def test_an_index_without_shards(self, tmp_path: Path, index: object) -> None:
        files = self._shards() | {INDEX_NAME: json.dumps(index).encode()}
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER/{INDEX_NAME}: weight_map is missing or empty"
        )

    def test_an_index_of_too_many_shards(self, tmp_path: Path) -> None:
        shards = {str(number): f"{number}.safetensors" for number in range(1025)}
        files = self._shards() | {INDEX_NAME: json.dumps({"weight_map": shards}).encode()}
        assert self._refusal(self._write(tmp_path, files)) == (
            f"failed to read FOLDER/{INDEX_NAME}: it names 1025 files, at most 1024 are read"
        )

    def test_no_config(self, tmp_path: Path) -> None:
        assert self._refusal(tmp_path) == (
            "failed to read FOLDER: it has no config.json; "
            "name a GGUF file, or a folder as downloaded from Hugging Face"
        )

    def test_no_safetensors(self, tmp_path: Path) -> None:
        self._write(tmp_path, {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b""})
        assert self._refusal(tmp_path) == (
            "failed to read FOLDER: it has no .safetensors file; convert the model to safetensors"
        )

    def test_a_config_that_is_no_json(self, tmp_path: Path) -> None:
        self._write(tmp_path, self._shards() | {"config.json": b"{]"})
        assert self._refusal(tmp_path) == (
            "failed to read FOLDER/config.json: it is not sound JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)"
        )

    def test_a_config_larger_than_the_limit(self, tmp_path: Path) -> None:
        self._write(tmp_path, self._shards())
        with (tmp_path / "config.json").open("r+b") as file:
            file.truncate(2**40)
        assert self._refusal(tmp_path) == (
            f"failed to read FOLDER/config.json: it has {2**40} bytes, at most {MAX_JSON_BYTES} are read"
        )

    def test_files_of_the_safetensors_package_are_read(self, tmp_path: Path) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        save_file({"b": np.zeros((3, 4), np.float16), "a": np.zeros(5, np.int64)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        spec = read_safetensors(tmp_path)
        found = {t.name: (t.tensor_type, t.shape, t.n_bytes) for t in spec.tensors}
        assert found == {"b": ("F16", (3, 4), 24), "a": ("I64", (5,), 40)}
        assert struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])[0] + 8 + 64 == spec.file_bytes
