"""The one request that the supervisor makes: a whole answer, or an OSError that says what is wrong."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from pascaline import redaction
from pascaline.engines import client
from pascaline.engines.client import json_object, request

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
                with contextlib.suppress(OSError):
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


@pytest.mark.parametrize(
    "answer",
    [
        f"{'A' * 60_000}sk-client-0123456789\r\n\r\n",
        f"HTTP/1.1 {'sk-client-0123456789' * 3000}\r\n\r\n",
        f"{'A' * 170} sk-client-0123456789\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {'9' * 4000}\r\n\r\nx",
    ],
)
def test_a_reason_is_short_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """It is shown in `/health`, in the log and in `systemctl status`."""
    secrets = redaction.Secrets()
    secrets.add("sk-client-0123456789")
    monkeypatch.setattr(redaction, "SECRETS", secrets)
    with saying(answer) as address, pytest.raises(ConnectionError) as raised:
        request(address, "/metrics", timeout=PATIENCE)
    assert len(str(raised.value)) < client.MAX_REASON_CHARACTERS + 40
    assert "sk-client" not in str(raised.value)


def test_silence() -> None:
    with saying("", then_close=False) as address, pytest.raises(TimeoutError):
        request(address, "/metrics", timeout=0.2)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        request(address, "/metrics", timeout=PATIENCE)


@contextmanager
def dripping(first: bytes, piece: bytes, seconds: float) -> Iterator[tuple[str, int]]:
    """A server that sends a beginning, and then the same again and again, until its client leaves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(first)
                while True:
                    connection.sendall(piece)
                    time.sleep(seconds)

        thread = threading.Thread(target=answer_once)
        thread.start()
        yield listener.getsockname()
        thread.join()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class TestOneDeadline:
    """Each read is in time, and the whole never ends."""

    @pytest.mark.parametrize(
        ("first", "piece"),
        [
            (b"", b"H"),
            (b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"#"),
            (b"HTTP/1.1 200 OK\r\n\r\n", b"#"),
            (CHUNKED, b"1\r\n#\r\n"),
            (CHUNKED + b"0\r\n", b"X: 1\r\n"),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ],
    )
    def test_a_drip(self, first: bytes, piece: bytes) -> None:
        start = time.monotonic()
        with dripping(first, piece, 0.05) as address, pytest.raises(OSError, match=r"timed out|broken answer|headers"):
            request(address, "/metrics", timeout=1.0)
        assert time.monotonic() - start < 3


class TestOneSize:
    @pytest.mark.parametrize(
        "first",
        [
            b"",
            b"HTTP/1.1 200 OK\r\nX: ",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            CHUNKED + b"-5\r\n",
            CHUNKED + b"fffffffff\r\n",
            CHUNKED + b"0\r\n",
        ],
    )
    def test_an_endless_answer_takes_no_memory(self, first: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with dripping(first, b"x" * 2**20, 0.0) as address, pytest.raises(ConnectionError):
            request(address, "/metrics", timeout=PATIENCE)
        # A growing buffer is copied, and the server of this test has its own.
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 8 * client.MAX_ANSWER_BYTES


@pytest.mark.parametrize("seed", range(200))
def test_noise_is_no_answer_and_nothing_else(seed: int) -> None:
    """Parts of answers in any order, and bytes of all kinds: a whole answer, or an OSError."""
    noise = random.Random(seed)
    parts = [
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 999 \r\n", b"HTTP/9 x\r\n", b"Content-Length: -1\r\n", b"\r\n", b"\n"),
        *(b"Content-Length: 5\r\n", b"Content-Length: 9" + b"9" * 5000 + b"\r\n", b"Transfer-Encoding: chunked\r\n"),
        *(b"5\r\nabcde\r\n", b"-1\r\n", b"zz\r\n", b"0\r\n\r\n", b": \r\n", b" folded\r\n", b"\xff\xfe\x00", b"\r"),
    ]
    answer = parts[0] * noise.randrange(2) + b"".join(noise.choices(parts, k=noise.randrange(8)))
    with saying(answer.decode("latin1")) as address, contextlib.suppress(OSError):
        status, _ = request(address, "/metrics", timeout=PATIENCE)
        assert 100 <= status <= 999


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"1", b"null", b'"x"', b"{", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"{} {}", b"NaN"),
        *(b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b"1e999", "{\u00a0}".encode()),
    ],
)
def test_what_is_no_json_object(content: bytes) -> None:
    with pytest.raises(ConnectionError, match=r"^not (JSON|a JSON object): "):
        json_object(content)


def test_a_json_object() -> None:
    assert json_object(json.dumps({"a": [1]}).encode()) == {"a": [1]}
