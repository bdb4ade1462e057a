"""The model store's fetch script, run as the unit runs it, against a real HTTP server that can and cannot resume."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH (Debian: apt install curl)")

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER_DIGEST = hashlib.sha256(b"").hexdigest()


@dataclass
class Server:
    """A file server that notes the ranges it was asked for."""

    url: str = ""
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            body = CONTENT[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state.url = f"http://127.0.0.1:{httpd.server_port}/model.gguf"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield state
        httpd.shutdown()


def fetch(source: str | Path, target: Path, *digests: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).resolve().parents[2] / "modules" / "fetch-model.sh"
    command = ["bash", "-euo", "pipefail", str(script), str(source), str(target), *(digests or (DIGEST,))]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "store" / "emily" / "model.gguf"


def test_download_is_verified_and_not_repeated(server: Server, target: Path) -> None:
    assert fetch(server.url, target).stdout == f"{target} is in place and verified\n"
    assert target.read_bytes() == CONTENT
    assert fetch(server.url, target).stdout == f"{target} is in place, verified before\n"
    assert server.asked == [None]


def test_interrupted_download_resumes_where_it_stopped(server: Server, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.with_name("model.gguf.partial").write_bytes(CONTENT[:1000])
    assert fetch(server.url, target).returncode == 0
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_server_that_cannot_resume_is_asked_for_the_whole_file(server: Server, target: Path) -> None:
    """A 200 to a range request holds the file from its start; appending it would make garbage."""
    server.ranges = False
    target.parent.mkdir(parents=True)
    target.with_name("model.gguf.partial").write_bytes(CONTENT[:1000])
    assert fetch(server.url, target).returncode == 0
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", None]


def test_wrong_checksum_is_refused_and_the_file_deleted(server: Server, target: Path) -> None:
    result = fetch(server.url, target, OTHER_DIGEST)
    assert result.returncode == 3
    assert result.stderr == (
        f"{server.url} has sha256 {DIGEST}, must be {OTHER_DIGEST}; the file was deleted: "
        "correct services.pascaline.models.<name>.sha256, or the source\n"
    )
    assert list(target.parent.iterdir()) == []


def test_a_damaged_beginning_is_fetched_anew_once(server: Server, target: Path) -> None:
    """As a power cut leaves it: long enough, and not what was fetched."""
    target.parent.mkdir(parents=True)
    target.with_name("model.gguf.partial").write_bytes(bytes(1000))
    assert fetch(server.url, target).returncode == 0
    assert target.read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", None]
    target.with_name("model.gguf.partial").write_bytes(bytes(1000))
    target.unlink()
    assert fetch(server.url, target, OTHER_DIGEST).returncode == 3
    assert server.asked == ["bytes=1000-", None] * 2
    assert not target.exists()


def test_a_checksum_in_capitals(server: Server, target: Path) -> None:
    assert fetch(server.url, target, DIGEST.upper()).returncode == 0
    assert target.with_name("model.gguf.verified").read_text().startswith(DIGEST)


def test_a_file_that_was_overwritten_with_its_time_put_back_is_verified_again(server: Server, target: Path) -> None:
    assert fetch(server.url, target).returncode == 0
    before = target.stat()
    target.write_bytes(bytes(len(CONTENT)))
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch(server.url, target).returncode == 3


class TestSplitModels:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        parts = [tmp_path / f"emily-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
        for number, part in enumerate(parts):
            part.write_bytes(bytes([number]) * 1000)
        return parts

    def digests(self, parts: list[Path]) -> list[str]:
        return [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]

    @pytest.mark.parametrize("prefix", ["", "file://"])
    def test_every_part_is_brought_and_verified(self, parts: list[Path], target: Path, prefix: str) -> None:
        folder = target.parent
        result = fetch(f"{prefix}{parts[0]}", folder / parts[0].name, *self.digests(parts))
        assert (result.returncode, result.stderr) == (0, "")
        assert [(folder / part.name).read_bytes() for part in parts] == [part.read_bytes() for part in parts]
        again = fetch(f"{prefix}{parts[0]}", folder / parts[0].name, *self.digests(parts))
        assert again.stdout == "".join(f"{folder / part.name} is in place, verified before\n" for part in parts)

    def test_damage_in_another_part_is_found(self, parts: list[Path], target: Path) -> None:
        digests = self.digests(parts)
        parts[1].write_bytes(b"x")
        result = fetch(parts[0], target.parent / parts[0].name, *digests)
        assert result.returncode == 3
        assert result.stderr.startswith(f"{parts[1]} has sha256 ")

    def test_checksums_for_a_file_that_is_no_first_part(self, server: Server, target: Path) -> None:
        result = fetch(server.url, target, DIGEST, DIGEST)
        assert result.returncode == 2
        assert result.stderr == (
            f"{server.url} is not the first of 2 parts: its name must end in -00001-of-00002.gguf, or one checksum be "
            "given\n"
        )


def test_changed_file_is_verified_again(server: Server, target: Path) -> None:
    assert fetch(server.url, target).returncode == 0
    target.write_bytes(b"tampered")
    assert fetch(server.url, target).returncode == 3
    assert not target.exists()


def test_file_is_copied_from_a_path(target: Path, tmp_path: Path) -> None:
    source = tmp_path / "given.gguf"
    source.write_bytes(CONTENT)
    assert fetch(source, target).returncode == 0
    assert target.read_bytes() == CONTENT
    assert source.exists()


def test_missing_source_is_named(target: Path, tmp_path: Path) -> None:
    result = fetch(tmp_path / "absent.gguf", target)
    assert result.returncode == 1
    assert (
        result.stderr == f"cannot read {tmp_path / 'absent.gguf'}: it must be a file that the pascaline user may read\n"
    )


def test_unreachable_server_leaves_the_partial_file_for_the_next_try(target: Path, server: Server) -> None:
    target.parent.mkdir(parents=True)
    partial = target.with_name("model.gguf.partial")
    partial.write_bytes(CONTENT[:1000])
    port_of_nobody = server.url.replace(server.url.split(":")[2].split("/")[0], "1")
    assert fetch(port_of_nobody, target).returncode == 1
    assert partial.read_bytes() == CONTENT[:1000]
    assert not target.exists()
