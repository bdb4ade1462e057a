"""A prepared folder is complete or not there, and is refused when its file has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType
from sglang_pascal.checkpoint import prepare as module
from sglang_pascal.checkpoint.prepare import open_prepared, prepare, read_manifest
from sglang_pascal.errors import CheckpointError, StorageError

FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "pascal.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def gguf(tiny_model, tmp_path):
    """A private copy, to be damaged at will."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model("qwen3").path.read_bytes())
    return path


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_everything_but_the_weights(gguf, tmp_path):
    manifest = prepare(gguf, tmp_path / "out")
    assert names(tmp_path / "out") == FILES
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < gguf.stat().st_size
    assert manifest == read_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pascal.json").read_text()) == {
        "gguf": str(gguf),
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "size": gguf.stat().st_size,
        "header_sha256": manifest.header_sha256,
        "architecture": "qwen3",
        "format": 2,
    }


def test_files_can_be_read_by_a_service_user(gguf, tmp_path):
    prepare(gguf, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())


def test_a_relative_path_is_kept_absolute(gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(Path("model.gguf"), Path("out")).gguf == str(gguf)


def test_preparing_again_replaces_the_folder(gguf, tmp_path):
    prepare(gguf, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    prepare(gguf, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"
    assert names(tmp_path) == {"model.gguf", "out"}


def test_a_folder_of_someone_else_is_left_alone(gguf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("work of years")
    with pytest.raises(StorageError) as error:
        prepare(gguf, tmp_path / "out")
    assert str(error.value) == (
        f'"{tmp_path}/out" exists and was not made by this command; name another folder or remove it'
    )
    assert names(tmp_path / "out") == {"thesis.txt"}


def test_another_checksum_is_refused_and_nothing_is_made(gguf, tmp_path):
    with pytest.raises(CheckpointError) as error:
        prepare(gguf, tmp_path / "out", sha256="00" * 32)
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert str(error.value) == f'"{gguf}" has sha256 {found}, expected {"00" * 32}; copy or download it again'
    assert names(tmp_path) == {"model.gguf"}


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_a_type_without_weights_is_refused_before_sglang_starts(gguf, tmp_path, name):
    data, key = bytearray(gguf.read_bytes()), name.encode()
    dimensions = data.index(key) + len(key)
    at = dimensions + 4 + 8 * int.from_bytes(data[dimensions : dimensions + 4], "little")
    data[at : at + 4] = GGMLQuantizationType.I8.to_bytes(4, "little")
    gguf.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf': tensor "{name}" of shape .* has type I8, which holds no weights$'):
        prepare(gguf, tmp_path / "out")
    assert names(tmp_path) == {"model.gguf"}


def test_the_checksum_may_be_in_capitals(gguf, tmp_path):
    prepare(gguf, tmp_path / "out", sha256=hashlib.sha256(gguf.read_bytes()).hexdigest().upper())


def test_progress_ends_at_the_size_of_the_file(gguf, tmp_path):
    seen = []
    prepare(gguf, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (gguf.stat().st_size, gguf.stat().st_size)


@pytest.mark.parametrize("failing", ["write_tokenizer", "_replace_folder", "_write_json"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_what_was_there_before(gguf, tmp_path, monkeypatch, failing, exists):
    if exists:
        prepare(gguf, tmp_path / "out")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, failing, full)
    with pytest.raises(StorageError) as error:
        prepare(gguf, tmp_path / "out")
    assert str(error.value) == f'failed to write "{tmp_path}/out": no space is left on the disk'
    assert names(tmp_path) == ({"model.gguf", "out"} if exists else {"model.gguf"})
    if exists:
        assert names(tmp_path / "out") == FILES


def test_a_really_full_disk(gguf, tmp_path):
    """A process that may write no more than 2 KiB into a file meets the kernel's own error."""
    script = (
        "import resource, signal, sys; from sglang_pascal.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "prepare", str(gguf), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9
    assert done.stderr == f'sglang-pascal: error: failed to write "{tmp_path}/out": File too large\n'
    assert names(tmp_path) == {"model.gguf"}


class TestChangedFile:
    def error(self, folder):
        with pytest.raises(CheckpointError) as error:
            open_prepared(folder)
        return str(error.value)

    def test_unchanged(self, gguf, tmp_path):
        prepare(gguf, tmp_path / "out")
        assert open_prepared(tmp_path / "out").path == gguf

    def test_gone(self, gguf, tmp_path):
        prepare(gguf, tmp_path / "out")
        gguf.unlink()
        assert self.error(tmp_path / "out") == f'model file "{gguf}" does not exist'

    def test_longer(self, gguf, tmp_path):
        size = gguf.stat().st_size
        prepare(gguf, tmp_path / "out")
        with gguf.open("ab") as file:
            file.write(b"x")
        assert self.error(tmp_path / "out") == (
            f'"{gguf}" has {size + 1} bytes, but had {size} when "{tmp_path}/out" was prepared; prepare it again'
        )

    def test_another_header_of_the_same_length(self, gguf, tmp_path):
        prepare(gguf, tmp_path / "out")
        data = bytearray(gguf.read_bytes())
        at = data.index(b"tokenizer.ggml.padding_token_id") + len(b"tokenizer.ggml.padding_token_id") + 4
        data[at] ^= 1
        gguf.write_bytes(data)
        assert self.error(tmp_path / "out") == (
            f'"{gguf}" has changed since "{tmp_path}/out" was prepared; prepare it again'
        )

    def test_not_prepared(self, tmp_path):
        assert self.error(tmp_path) == (
            f'"{tmp_path}" is not a prepared model: pascal.json is missing; run sglang-pascal prepare'
        )

    def test_of_another_format(self, gguf, tmp_path):
        prepare(gguf, tmp_path / "out")
        path = tmp_path / "out" / "pascal.json"
        path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
        assert self.error(tmp_path / "out") == f'"{path}" has format 3, expected 2; prepare it again'

    def test_damaged_manifest(self, gguf, tmp_path):
        prepare(gguf, tmp_path / "out")
        path = tmp_path / "out" / "pascal.json"
        path.write_text("{")
        assert self.error(tmp_path / "out").startswith(f'"{path}" is damaged: JSONDecodeError(')


class TestCommand:
    def run(self, *args):
        command = [sys.executable, "-m", "sglang_pascal", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def test_prepare(self, gguf, tmp_path):
        done = self.run("prepare", gguf, tmp_path / "out", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "pascal.json").read_text())

    def test_a_checksum_that_is_known_is_not_computed_again(self, gguf, tmp_path):
        done = self.run("prepare", gguf, tmp_path / "out", "--known-sha256", "ab" * 32, "--json")
        assert json.loads(done.stdout)["sha256"] == "ab" * 32

    def test_a_bad_file_ends_with_3_and_one_line(self, tmp_path):
        done = self.run("prepare", tmp_path / "none.gguf", tmp_path / "out")
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f'sglang-pascal: error: model file "{tmp_path}/none.gguf" does not exist\n'

    def test_wrong_usage_ends_with_2(self):
        assert self.run("prepare").returncode == 2

    def test_preparing_never_imports_torch(self, gguf, tmp_path):
        script = (
            "import sys; from sglang_pascal.__main__ import main; code = main(sys.argv[1:]);"
            "sys.exit(code or ('torch' in sys.modules) * 50)"
        )
        command = [sys.executable, "-c", script, "prepare", str(gguf), str(tmp_path / "out")]
        assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0

    def test_info_names_device_versions_and_shims(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        facts = json.loads(self.run("info", "--json").stdout)
        assert (facts["active"], facts["device"], facts["reason"]) == (True, "cpu", "no NVIDIA device is visible")
        assert facts["sglang"] in facts["sglang_supported"]
        assert facts["kernels"] == "not used: operations compute in plain torch"
        assert {shim["name"] for shim in facts["shims"]} >= {"attention backend", "load format"}


def test_the_builtin_model_has_a_chat_template(builtin_gguf, tmp_path):
    prepare(builtin_gguf, tmp_path / "out")
    assert names(tmp_path / "out") == FILES
