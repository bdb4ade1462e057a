"""Clients that send malformed requests by the thousand, several on a connection, and read what comes back."""

from __future__ import annotations

import asyncio
import random
import re

from support.instance import PATIENCE
from support.ledger import stretch

SEED = 17
AT_ONCE = 32
"""Connections at once: half of the servers' limit, so that none is closed to make room."""
REQUESTS = 12
"""Requests of one connection, before the noise that ends it."""
ANSWER = re.compile(rb"HTTP/1\.[01] [2-5]\d\d ")
"""The beginning of a final answer."""
METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"BREW", b"get", b"G" * 60)
PATHS = (
    *(b"/..%2f..%2fetc/passwd", b"//", b"/%00", b"/%", b"/" + b"a" * 900, b"/health/../drain", b"/?" + b"&=" * 200),
    *(b"/metrics%0d%0aX:%20y", b"/livez/", b"/plan?%ff", b"*", b"http://evil.example/", b"/\xc3\xa4", b"/;a=b", b"/{}"),
)
HEADERS = (
    *(b"X: \xf0\x28\x8c\x28", b"Authorization: Bearer \xff", b"Origin: http://evil.example", b"Range: bytes=9-1"),
    *(b"Content-Length: 0", b"Content-Length: 3", b"Expect: 100-continue", b"Transfer-Encoding: identity"),
    *(
        b"Accept: " + b"*/*," * 300,
        b"If-Match: \x80",
        b"Connection: upgrade\r\nUpgrade: websocket",
        b"Cookie: " + b"=;" * 99,
    ),
    *(b"X-Prometheus-Scrape-Timeout-Seconds: nan", b"Content-Type: \xff/json", b"X-Forwarded-For: ,,,", b"Te: x" * 20),
)
PARTS = (
    *(b"GET ", b"POST ", b"HEAD ", b"PUT ", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00"),
    *(b"\xff" * 40, b"/metrics", b"/health", b"/drain", b"/..%2f..%2fetc/passwd", b"//", b"/%00", b"*"),
    *(b"/" + b"a" * 9000, b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/9.9\r\n", b"\r\n", b"\n", b"\r\n\r\n", b" "),
    *(b"Host: x\r\n", b"Host: \r\nHost: y\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked, chunked\r\n\r\nzz\r\n", b"0\r\n\r\n"),
    *(b"ffffffffff\r\n", b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b": empty\r\n"),
    *(b"A" * 70_000 + b": b\r\n", b"Origin: http://evil.example\r\n", b"Authorization: Bearer \xff\r\n"),
    *(b"X: \xf0\x28\x8c\x28\r\n", b"{" * 500),
)


def noise(rng: random.Random) -> bytes:
    """Return the beginning, the middle or the whole of a request, with parts that do not belong together."""
    text = b"".join(rng.choices(PARTS, k=rng.randint(1, 6)))
    if rng.random() < 0.3:
        position = rng.randrange(len(text))
        text = text[:position] + rng.randbytes(rng.randint(0, 8)) + text[position + 1 :]
    return text


def malformed(rng: random.Random) -> bytes:
    """Return a request whose end a server finds, so that it may read another one; all else in it is wrong."""
    method = rng.choices(METHODS, [60, *[1] * (len(METHODS) - 1)])[0]
    headers = b"\r\n".join([*rng.sample(HEADERS, rng.randint(0, 2)), b"Host: x"])
    return b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (method, rng.choice(PATHS), headers)


class _Hostile(asyncio.Protocol):
    """One connection: malformed requests until the server has answered them all, then noise, then its end."""

    def __init__(self, rng: random.Random) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        """Becomes the number of requests that the server answered, or closed the connection at."""
        self._rng = rng
        self._received = b""
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"".join(malformed(self._rng) for _ in range(REQUESTS)))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._is_over and self._answers() >= REQUESTS:
            self._make_noise()

    def _answers(self) -> int:
        return len(ANSWER.findall(self._received))

    def _make_noise(self) -> None:
        self._is_over = True
        self._transport.write(noise(self._rng))
        if self._rng.random() < 0.2:
            self._transport.abort()
        else:
            self._transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.ended.set_result(REQUESTS + 1 if self._is_over else max(1, self._answers()))


async def _send(port: int, count: int, seed: int) -> None:
    """Open connections until the server has dealt with `count` requests."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    handled = 0

    async def one_after_the_other() -> None:
        nonlocal handled
        while handled < count:
            _, protocol = await loop.create_connection(lambda: _Hostile(rng), "127.0.0.1", port)
            ended = await asyncio.wait_for(protocol.ended, PATIENCE * stretch())
            handled += ended

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(one_after_the_other())


def send_noise(port: int, count: int, seed: int = SEED) -> None:
    """Let a server answer this many malformed requests, or close the connection at them.

    Raises ExceptionGroup if the server refuses a connection, or leaves one open though its client has ended it.
    """
    asyncio.run(_send(port, count, seed))
