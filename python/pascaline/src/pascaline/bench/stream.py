"""A streamed HTTP request with a time stamp for each event. Written by hand because general clients cost too much.

At the 200 events a second that a Tesla P4 can send, this takes half of httpx's CPU time, and h11 in the place of
ResponseParser takes a third more than this (benchmarks/bench_load.py, docs/results/bench-load.md).
One connection per request, HTTP/1.1, chunked or not; server-sent events as OpenAI's API defines them.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pascaline.errors import ConfigurationError
from pascaline.redaction import redact

OnEvent = Callable[[float, bytes], None]
"""Called with (time.perf_counter() at arrival, data of the event)."""

MAX_HEAD_BYTES = 64 * 1024
MAX_ERROR_BYTES = 4096
"""Most bytes of an error's body that are kept."""


class StreamError(Exception):
    """The request failed; the text says why."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address to send requests to."""

    url: str
    """Scheme, host and port, without a path: http://127.0.0.1:30000."""
    api_key: str | None = None

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.url).scheme == "https"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if self.tls else 80)

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.address[0] in {"localhost", "::1"} or self.address[0].startswith("127.")


def parse_endpoint(text: str, api_key: str | None = None) -> Endpoint:
    """Check a URL such as http://host:30000. A trailing /v1 is accepted, because OpenAI clients are given one."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"--url: {text!r} is not a URL: {error}") from error
    path = parts.path.rstrip("/").removesuffix("/v1")
    if parts.scheme not in {"http", "https"} or not parts.hostname or path or parts.query:
        raise ConfigurationError(f"--url: must be like http://127.0.0.1:30000, got {text!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(f"{parts.scheme}://{host}{f':{port}' if port else ''}", api_key)


class ResponseParser:
    """Turns the bytes of one HTTP/1.1 response into server-sent events as they arrive."""

    def __init__(self, on_event: OnEvent) -> None:
        """on_event: called for each event of a response with status 200."""
        self.status = 0
        self.complete = False
        """Whether the body has ended as its headers announced."""
        self.error_body = b""
        """The beginning of the body if the status is not 200."""
        self._on_event = on_event
        self._buffer = b""
        self._line = b""
        self._take: Callable[[float], bool] = self._take_head
        self._remaining: int | None = None
        """Bytes that the body or the chunk still lacks; None: the body ends with the connection."""

    def feed(self, now: float, data: bytes) -> None:
        """Read bytes that arrived at a time."""
        self._buffer += data
        while not self.complete and self._take(now):
            pass

    def feed_eof(self) -> None:
        """Record that the server closed the connection; this ends a body without a length."""
        if self._take == self._take_body and self._remaining is None:
            self.complete = True

    def _take_head(self, _: float) -> bool:
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            if len(head) > MAX_HEAD_BYTES:
                raise StreamError(f"the head of the response is longer than {MAX_HEAD_BYTES} bytes")
            return False
        first, *lines = head.split(b"\r\n")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise StreamError(f"not an HTTP response: {first[:80]!r}")
        self._buffer = rest
        if words[1] == b"100":
            return True
        self.status = int(words[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
            self._take = self._take_chunk_size
        else:
            length = headers.get(b"content-length")
            self._remaining = int(length) if length is not None and length.isdigit() else None
            self._take = self._take_body
        return True

    def _take_body(self, now: float) -> bool:
        data, self._buffer = self._buffer, b""
        self._content(now, data)
        if self._remaining is not None:
            self._remaining -= len(data)
            self.complete = self._remaining <= 0
        return False

    def _take_chunk_size(self, _: float) -> bool:
        line, separator, rest = self._buffer.partition(b"\r\n")
        if not separator:
            return False
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError:
            raise StreamError(f"broken chunk size in the response: {line[:40]!r}") from None
        self._buffer = rest
        self.complete = size == 0
        self._remaining = size
        self._take = self._take_chunk
        return True

    def _take_chunk(self, now: float) -> bool:
        size = self._remaining or 0
        if len(self._buffer) < size + 2:
            return False
        self._content(now, self._buffer[:size])
        self._buffer = self._buffer[size + 2 :]
        self._take = self._take_chunk_size
        return True

    def _content(self, now: float, data: bytes) -> None:
        if self.status != 200:
            self.error_body = (self.error_body + data)[:MAX_ERROR_BYTES]
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(now, line[5:].strip())


class _Connection(asyncio.Protocol):
    """Sends one request and feeds the parser."""

    def __init__(self, request: bytes, parser: ResponseParser, ended: asyncio.Future[None]) -> None:
        self._request = request
        self._parser = parser
        self._ended = ended
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(time.perf_counter(), data)
        except (StreamError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._finish(error if isinstance(error, StreamError) else StreamError(f"broken event: {error!r}"))
            return
        if self._parser.complete:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._parser.feed_eof()
        cut = None if self._parser.complete else StreamError(f"the server closed the connection{_because(exc)}")
        self._finish(cut)

    def _finish(self, error: StreamError | None) -> None:
        if self._transport is not None:
            self._transport.abort()
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)


async def post_stream(endpoint: Endpoint, path: str, body: dict[str, Any], on_event: OnEvent, timeout: float) -> None:
    """POST a JSON body and pass on the events of the answer. Raises StreamError if the answer is not complete.

    timeout: seconds for the whole exchange. Callers measure the time to connect too.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    parser = ResponseParser(on_event)
    host, port = endpoint.address
    request = _request(endpoint, path, json.dumps(body).encode())
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout):
            context = ssl.create_default_context() if endpoint.tls else None
            transport, _ = await loop.create_connection(
                lambda: _Connection(request, parser, ended), host, port, ssl=context
            )
            await ended
    except TimeoutError:
        raise StreamError(f"no complete answer within {timeout:g} s") from None
    except OSError as error:
        raise StreamError(f"failed to connect to {host}:{port}: {error.strerror or error}") from error
    finally:
        if transport is not None:
            transport.close()
    if parser.status != 200:
        text = " ".join(parser.error_body.decode(errors="replace").split())
        raise StreamError(f"status {parser.status}: {redact(text)[:300]}")


def _request(endpoint: Endpoint, path: str, body: bytes) -> bytes:
    host = urlsplit(endpoint.url).netloc
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Accept: text/event-stream",
        "Connection: close",
    ]
    if endpoint.api_key:
        head.append(f"Authorization: Bearer {endpoint.api_key}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def _because(error: Exception | None) -> str:
    return f": {error}" if error else " in the middle of the answer"
