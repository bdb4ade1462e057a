"""A model behind a licence: the token reaches the server that asks for it and no other, its reasons reach the user."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import httpx
import pytest
from pascaline.errors import ModelError
from pascaline.models.library import add
from pascaline.models.reader import read_model
from pascaline.models.server_words import status_words
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GOOD = {"Authorization": "Bearer good"}


@contextmanager
def listening(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """Serve on loopback and yield the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(body))}).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


@dataclass
class Hub:
    """A server that knows who asks, and sends them on to a store that must not know."""

    url: str = ""
    path: Path | None = None
    seen_by_store: list[str | None] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    path = write_gguf(tmp_path / "emily.gguf", tiny("llama"), "Q8_0")
    state, body = Hub(path=path), path.read_bytes()

    def store(handler: BaseHTTPRequestHandler) -> None:
        state.seen_by_store.append(handler.headers["Authorization"])
        start, _, end = handler.headers.get("Range", "bytes=0-")[6:].partition("-")
        part = body[int(start) : int(end or len(body)) + 1]
        ranged = {"Content_Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"}
        send(handler, 206 if "Range" in handler.headers else 200, part, ETag='"one"', **ranged)

    def gate(handler: BaseHTTPRequestHandler) -> None:
        token = handler.headers["Authorization"]
        if token is None:
            send(handler, 401, X_Error_Message="Please log in.")
        elif token != GOOD["Authorization"]:
            send(handler, 403, X_Error_Message="Ask for access.")
        else:
            send(handler, 302, Location=f"http://localhost:{store_port}/emily.gguf")

    with listening(store) as store_port, listening(gate) as port:
        state.url = f"http://127.0.0.1:{port}/emily.gguf"
        yield state


def test_the_token_opens_the_gate_and_goes_no_further(hub: Hub, tmp_path: Path) -> None:
    assert hub.path is not None
    assert read_model(hub.url, GOOD).tensors == read_model(hub.path).tensors
    assert add(tmp_path / "store", "emily", hub.url, headers=GOOD).path.read_bytes() == hub.path.read_bytes()
    assert hub.seen_by_store
    assert set(hub.seen_by_store) == {None}


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, '401 Unauthorized ("Please log in."); name a file with an access token in --token-file'),
        (
            {"Authorization": "Bearer bad"},
            '403 Forbidden ("Ask for access."); the token in --token-file may not read it: ask for access on the '
            "model's page, or name another token",
        ),
    ],
)
@pytest.mark.parametrize("action", ["read", "download"])
def test_a_refusal_has_the_servers_words(
    hub: Hub, tmp_path: Path, headers: dict[str, str], words: str, action: str
) -> None:
    act = partial(read_model, hub.url) if action == "read" else partial(add, tmp_path / "store", "emily", hub.url)
    with pytest.raises(ModelError) as caught:
        act(headers=headers)
    assert str(caught.value) == f"failed to {action} {hub.url}: the server answered {words}"


def test_the_servers_words_are_bounded_and_printable() -> None:
    response = httpx.Response(401, headers={"X-Error-Message": "a\x1b[2J\n" + "b" * 1000})
    words = status_words(response, with_token=True)
    assert words.isprintable()
    assert len(words) < 500
    assert words.endswith("; the token in --token-file is not valid there: make a new one")


class TestPlan:
    def plan(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pascaline", "plan", *map(str, arguments), "--card", "tesla-p4"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_it_takes_a_token(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("good\n")
        assert self.plan(hub.url, "--context=1024", f"--token-file={tmp_path / 'token'}").returncode == 0

    def test_a_token_for_a_file_is_a_mistake(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("good\n")
        done = self.plan(hub.path, f"--token-file={tmp_path / 'token'}")
        assert (done.returncode, done.stderr) == (
            2,
            f"pascaline plan: --token-file: {hub.path} is not an http(s) address and needs none; leave it out\n",
        )

    def test_checksums_that_do_not_cover_the_model(self, hub: Hub) -> None:
        """What serve refuses, plan does not call fitting."""
        done = self.plan(hub.path, f"--model-sha256={'0' * 64},{'0' * 64}")
        assert (done.returncode, done.stderr) == (
            2,
            "pascaline plan: model_sha256: 2 checksums are given, and the model is one file; set the checksum of that "
            "file\n",
        )
