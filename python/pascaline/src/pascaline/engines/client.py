"""One HTTP request to an engine, blocking and bounded: the supervisor runs it in a thread.

A faulty engine may send anything, at any speed, for ever. So each exchange has one deadline and one limit of bytes, and
anything except a complete answer becomes an OSError.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from pascaline.redaction import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from _typeshed import WriteableBuffer

    Listener = Callable[[], tuple[tuple[str, int], int]]
    """Returns ((numeric address, port), inode) of the socket to connect to, or raises OSError."""

MAX_ANSWER_BYTES = 4 * 2**20
"""Limit of an answer's body."""
MAX_FRAME_BYTES = 256 * 2**10
"""Limit of everything else in an answer: status, headers, chunk sizes."""
MAX_REASON_CHARACTERS = 200
"""Limit of what an error quotes of an answer: a header may have 64 KiB, a length as many digits."""

PIECE_BYTES = 16 * 2**10
"""Most bytes of an answer that are passed on at once."""


def request(
    address: tuple[str, int],
    path: str,
    *,
    body: dict[str, Any] | None = None,
    api_key: str | None = None,
    timeout: float,
    listener: Listener | None = None,
) -> tuple[int, bytes]:
    """Return (HTTP status, body) of a GET, or of a POST if there is a body to send.

    address: host and port. timeout: seconds for the whole exchange, from connecting to the last byte. listener: finds
    the socket to connect to. It is called before and after connecting; nothing is sent unless both calls agree.
    Raises only OSError: no complete answer of at most MAX_ANSWER_BYTES came in time.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    exchange = stream(address, path, body=body, headers=headers, timeout=timeout, listener=listener)
    try:
        return exchange.status, exchange.whole()
    finally:
        exchange.close()


class Exchange:
    """An answer that is read while it comes. Not for several threads, except `abort`."""

    def __init__(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        """Take over a connection whose answer has begun; use `stream`."""
        self.status = answer.status
        """HTTP status."""
        self.content_type = answer.headers.get("content-type", "")
        self._connection = connection
        self._answer = answer
        # The answer takes the socket over, if the connection ends with it.
        self._socket = connection.sock

    def piece(self) -> bytes:
        """Return the next bytes as soon as there are some; empty at the end. Raises OSError."""
        with _broken_as_os_error():
            return self._answer.read1(PIECE_BYTES)

    def whole(self) -> bytes:
        """Return the rest of the body. Raises OSError unless it is complete and not longer than MAX_ANSWER_BYTES."""
        with _broken_as_os_error():
            return _whole(self._answer)

    def abort(self) -> None:
        """End it from another thread: a read that waits returns at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()
        self._connection.close()


def stream(
    address: tuple[str, int],
    path: str,
    *,
    body: dict[str, Any] | None = None,
    headers: Mapping[str, str],
    timeout: float,
    listener: Listener | None = None,
) -> Exchange:
    """Send a request as `request` does, with these headers; return once the answer's headers are there.

    The caller closes the exchange. Raises OSError.
    """
    found = listener() if listener is not None else None
    connection = _BoundedConnection(*(found[0] if found else reachable(address)), timeout=timeout)
    try:
        with _broken_as_os_error():
            connection.connect()
            if listener is not None and listener() != found:
                raise ConnectionError("another socket took the port while it was connected to")
            if body is None:
                connection.request("GET", path, headers=dict(headers))
            else:
                connection.request("POST", path, json.dumps(body), {**headers, "Content-Type": "application/json"})
            return Exchange(connection, connection.getresponse())
    except BaseException:
        connection.close()
        raise


@contextlib.contextmanager
def _broken_as_os_error() -> Iterator[None]:
    """Turn whatever a malformed answer raises into OSError."""
    try:
        yield
    except OSError:
        raise
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    except Exception as error:
        # http.client's own errors, and those that it and the parsers that it uses raise for malformed input.
        raise ConnectionError(f"broken answer: {excerpt(repr(error), MAX_REASON_CHARACTERS)}") from error


def json_object(content: bytes) -> dict[str, Any]:
    """Parse an answer as a JSON object. Raises only ConnectionError, if it is anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConnectionError(f"not a JSON object: {type(found).__name__}")
    return found


class _BoundedSocket(socket.socket):
    """A connected socket with one deadline for all reads and writes, and one limit of bytes for all reads."""

    deadline: float
    """Seconds of the monotonic clock."""
    remaining_bytes: int

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Read some bytes."""
        self._hurry()
        count = super().recv_into(buffer, nbytes, flags)
        self.remaining_bytes -= count
        if self.remaining_bytes < 0:
            raise ConnectionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all bytes; sendall applies a socket's timeout to the whole call."""
        self._hurry()
        super().sendall(data, flags)

    def _hurry(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)


class _BoundedConnection(http.client.HTTPConnection):
    """An HTTP connection over a _BoundedSocket."""

    def connect(self) -> None:
        """Connect."""
        assert isinstance(self.timeout, float | int)
        deadline = time.monotonic() + self.timeout
        plain = socket.create_connection((self.host, self.port), self.timeout)
        self.sock = bounded = _BoundedSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        bounded.deadline = deadline
        bounded.remaining_bytes = MAX_ANSWER_BYTES + MAX_FRAME_BYTES
        bounded.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _whole(answer: http.client.HTTPResponse) -> bytes:
    content = answer.read(MAX_ANSWER_BYTES + 1)
    if len(content) > MAX_ANSWER_BYTES:
        raise ConnectionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    # A read with a size returns early without an error if the connection ends, for example if the engine was killed.
    if answer.length:
        missing = excerpt(str(answer.length), MAX_REASON_CHARACTERS)
        raise ConnectionError(f"the answer ended {missing} bytes early")
    return content


def reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Return the address to connect to for an address that a server listens on: loopback for a wildcard."""
    host, port = address
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not listened on
