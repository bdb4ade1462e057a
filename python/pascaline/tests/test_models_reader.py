"""read_model: what a path may be, and what it must not do (block, follow loops, read what shrinks)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.errors import ModelError
from pascaline.models.gguf_header import read_header
from pascaline.models.reader import read_model
from pascaline.models.source import FileSource, open_file
from support.models import tiny, write_gguf
from support.privileges import ordinary
from support.raw_models import CONFIG, gguf_file, safetensors_file


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as raised:
        read_model(path)
    return str(raised.value)


def _folder(path: Path) -> Path:
    header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [16, 8], "data_offsets": [0, 256]}}
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(safetensors_file(header, data_bytes=256))
    return path


class TestGoodPlaces:
    @pytest.mark.parametrize("name", ["model.gguf", "sha256-0123", "model.bin"])
    def test_a_gguf_file_of_any_name(self, tmp_path: Path, name: str) -> None:
        path = write_gguf(tmp_path / name, tiny("llama"), "Q8_0")
        assert read_model(path) == read_model(str(path))
        assert read_model(path).format == "gguf"

    @pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
    def test_a_folder_or_a_file_in_it(self, tmp_path: Path, name: str) -> None:
        assert read_model(_folder(tmp_path) / name).format == "safetensors"

    def test_a_symbolic_link(self, tmp_path: Path) -> None:
        target = write_gguf(tmp_path / "model.gguf", tiny("llama"), "Q8_0")
        (tmp_path / "link.gguf").symlink_to(target)
        assert read_model(tmp_path / "link.gguf").tensors == read_model(target).tensors


class TestBadPlaces:
    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "none.gguf"
        assert refusal(path) == (
            f"failed to read {path}: there is no such file; name a GGUF file or a Hugging Face folder"
        )

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").symlink_to(tmp_path / "b.gguf")
        (tmp_path / "b.gguf").symlink_to(tmp_path / "a.gguf")
        assert refusal(tmp_path / "a.gguf") == (
            f"failed to read {tmp_path / 'a.gguf'}: Too many levels of symbolic links"
        )

    def test_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").symlink_to(tmp_path / "none")
        assert refusal(tmp_path / "a.gguf").endswith("there is no such file; name a GGUF file or a Hugging Face folder")

    def test_a_fifo_without_a_writer_does_not_block(self, tmp_path: Path) -> None:
        path = tmp_path / "fifo.gguf"
        os.mkfifo(path)
        assert refusal(path) == f"failed to read {path}: it is a FIFO, must be a regular file"

    def test_a_device(self) -> None:
        assert refusal("/dev/zero") == "failed to read /dev/zero: it is a character device, must be a regular file"

    def test_a_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            assert refusal(path) == f"failed to read {path}: it is a socket, must be a regular file"

    def test_a_folder_where_a_file_must_be(self, tmp_path: Path) -> None:
        (_folder(tmp_path) / "model.safetensors").unlink()
        (tmp_path / "model.safetensors").mkdir()
        assert refusal(tmp_path) == (
            f"failed to read {tmp_path / 'model.safetensors'}: it is a directory, must be a regular file"
        )

    def test_a_name_with_a_nul(self) -> None:
        assert refusal("a\0b") == "failed to read 'a\\x00b': embedded null byte"

    def test_a_name_that_is_too_long(self) -> None:
        assert refusal("n" * 300).endswith("File name too long")

    def test_a_file_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_file())
        path.chmod(0)
        program = "import sys; from pascaline.models.reader import read_model; read_model(sys.argv[1])"
        command = ordinary([sys.executable, "-c", program, str(path)])
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.stderr.endswith(f"ModelError: failed to read {path}: Permission denied\n")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama", vocab_size=100_000), "Q8_0", sparse=True)
    size = path.stat().st_size

    class Shrinking(FileSource):
        chunk_bytes = 4096

        def read_at(self, offset: int, count: int) -> bytes:
            if offset:
                os.truncate(path, 5000)
            return super().read_at(offset, count)

    with open_file(path) as source, pytest.raises(ModelError) as raised:
        read_header(Shrinking(path, source._descriptor, source.size))
    assert str(raised.value) == (
        f"failed to read {path}: it shrank from {size} bytes to 5000 or fewer while it was read; "
        "wait until nothing writes to it, then try again"
    )


def test_descriptors_are_closed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(gguf_file())
    bad.write_bytes(b"none")
    before = len(list(Path("/proc/self/fd").iterdir()))
    read_model(good)
    refusal(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
