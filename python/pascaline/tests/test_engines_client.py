"""The one request that the supervisor makes: a whole answer, or an OSError that says what is wrong."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from pascaline.engines import client
from pascaline.engines.client import request

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 20.0
PAGE = "sglang:num_running_reqs 1\n"


@contextmanager
def saying(answer: str, *, then_close: bool = True) -> Iterator[tuple[str, int]]:
    """A server that reads one request and answers with these bytes; yields its address."""
    received = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer.encode())
                if not then_close:
                    received.wait(PATIENCE)

        thread = threading.Thread(target=answer_once)
        thread.start()
        yield listener.getsockname()
        received.set()
        thread.join()


def ok(body: str, length: int | None = None) -> str:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n{body}"


def test_a_whole_answer() -> None:
    with saying(ok(PAGE)) as address:
        assert request(address, "/metrics", timeout=PATIENCE) == (200, PAGE.encode())


def test_an_answer_without_a_length_is_whole_at_its_end() -> None:
    with saying(f"HTTP/1.0 503 Busy\r\n\r\n{PAGE}") as address:
        assert request(address, "/metrics", timeout=PATIENCE) == (503, PAGE.encode())


@pytest.mark.parametrize("sent", [0, 1, len(PAGE) - 1])
def test_one_that_ends_early_is_broken(sent: int) -> None:
    """An engine that is killed while it answers: half a page would be read as numbers."""
    with (
        saying(ok(PAGE[:sent], len(PAGE))) as address,
        pytest.raises(ConnectionError, match=f"^the answer ended {len(PAGE) - sent} bytes early$"),
    ):
        request(address, "/metrics", timeout=PATIENCE)


@pytest.mark.parametrize(("limit", "too_long"), [(len(PAGE), False), (len(PAGE) - 1, True)])
def test_one_that_is_too_long_is_not_cut(monkeypatch: pytest.MonkeyPatch, limit: int, too_long: bool) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", limit)
    with saying(ok(PAGE)) as address:
        if not too_long:
            assert request(address, "/metrics", timeout=PATIENCE)[0] == 200
            return
        with pytest.raises(ConnectionError, match=f"^the answer is longer than {limit} bytes$"):
            request(address, "/metrics", timeout=PATIENCE)


@pytest.mark.parametrize(
    "answer", ["", "no HTTP\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"]
)
def test_what_is_no_answer(answer: str) -> None:
    with saying(answer) as address, pytest.raises(ConnectionError):
        request(address, "/metrics", timeout=PATIENCE)


def test_silence() -> None:
    with saying("", then_close=False) as address, pytest.raises(TimeoutError):
        request(address, "/metrics", timeout=0.2)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        request(address, "/metrics", timeout=PATIENCE)
