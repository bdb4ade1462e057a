"""One HTTP request to an engine, blocking and bounded: the supervisor runs it in a thread.

An engine that is ill may send anything, at any speed, for ever. Each exchange has one deadline and one limit of bytes
in all, and whatever comes instead of a whole answer is an OSError.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

    Listener = Callable[[], tuple[tuple[str, int], int]]
    """Returns ((numeric address, port), number) of the socket that is to be reached, or raises OSError."""

MAX_ANSWER_BYTES = 4 * 2**20
"""Of an answer's content."""
MAX_FRAME_BYTES = 256 * 2**10
"""Of everything else: status, headers, the sizes of chunks."""


def request(
    address: tuple[str, int],
    path: str,
    *,
    body: dict[str, Any] | None = None,
    api_key: str | None = None,
    timeout: float,
    listener: Listener | None = None,
) -> tuple[int, bytes]:
    """Return (status, answer) of a GET, or of a POST where there is a body.

    address: host and port. timeout: seconds for all of it, from connecting to the last byte. listener: finds the socket
    that may be talked to; asked before and after connecting, and nothing is sent unless it is the same both times.
    Raises OSError where no whole answer of at most MAX_ANSWER_BYTES came in time, and nothing else.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    found = listener() if listener is not None else None
    connection = _BoundedConnection(*(found[0] if found else reachable(address)), timeout=timeout)
    try:
        connection.connect()
        if listener is not None and listener() != found:
            raise ConnectionError("another socket took the port while it was connected to")
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, _whole(answer)
    except OSError:
        raise
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    except Exception as error:
        # http.client's own errors, and what its parser and those below it raise over odd input.
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


def json_object(content: bytes) -> dict[str, Any]:
    """Return the JSON object that an answer is. Raises ConnectionError for whatever else it is, and nothing else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConnectionError(f"not a JSON object: {type(found).__name__}")
    return found


class _BoundedSocket(socket.socket):
    """A connected socket that gives all its reads and writes together a deadline, and its reads a limit of bytes."""

    deadline: float
    """On the monotonic clock."""
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
        """Send all bytes; a time limit of a socket is one for the whole here."""
        self._hurry()
        super().sendall(data, flags)

    def _hurry(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left)


class _BoundedConnection(http.client.HTTPConnection):
    """A connection over such a socket."""

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
    # A read of at most so many bytes does not tell an early end, as of an engine that was killed, from the real one.
    if answer.length:
        raise ConnectionError(f"the answer ended {answer.length} bytes early")
    return content


def reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Return where to connect to for an address that is listened on: a wildcard is reached by loopback."""
    host, port = address
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not listened on
