"""Limits of the agent's connections."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import TYPE_CHECKING

import pytest
import uvicorn
from pascaline.descriptors import (
    LEAST_CONNECTIONS,
    MOST_CONNECTIONS,
    RESERVED_DESCRIPTORS,
    connection_limit,
    raise_descriptor_limit,
)
from pascaline.serving.connections import HEARD, Connections, bounded_protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

PATIENCE = 20.0
HALF = b"GET / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("descriptors", "expected"),
    [
        (32, LEAST_CONNECTIONS),
        (RESERVED_DESCRIPTORS + 20, 10),
        (256, MOST_CONNECTIONS),
        (65536, MOST_CONNECTIONS),
    ],
)
def test_some_descriptors_are_never_for_connections(descriptors: int, expected: int) -> None:
    assert connection_limit(descriptors) == expected


def test_the_limit_of_descriptors_is_raised_and_never_lowered() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert raise_descriptor_limit(1) == soft
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert raise_descriptor_limit(600) == 600
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def answer(scope: Any, receive: Any, send: Any) -> None:
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def endless(scope: Any, receive: Any, send: Any) -> None:
    """Ten parts in a second; calls what says that the client has read them if the path is /read."""
    del receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(10):
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        if scope["path"] == "/read":
            scope["state"][HEARD]()
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"end"})


@contextlib.asynccontextmanager
async def served(connections: Connections, app: Any = answer) -> AsyncIterator[tuple[str, int]]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", http=bounded_protocol(connections), ws="none", backlog=64
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield listener.getsockname()
    server.should_exit = True
    await running


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(HALF + b"\r\n")
    return (await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE))[:15]


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""


def test_a_request_that_never_becomes_whole_ends_though_bytes_trickle_in() -> None:
    async def whole() -> None:
        async with served(Connections(8, 0.5)) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(HALF)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"x: y\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.05)
                pytest.fail("it was still open after ten times its time")
            await ended(reader)
            writer.close()

    asyncio.run(whole())


def test_one_that_asks_again_and_again_stays() -> None:
    async def whole() -> None:
        async with served(Connections(8, 1.0)) as address:
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(8):
                assert await ask(reader, writer) == b"HTTP/1.1 200 OK"
                await asyncio.sleep(0.25)
            await ended(reader)
            writer.close()

    asyncio.run(whole())


def test_a_new_one_displaces_the_longest_quiet() -> None:
    async def whole() -> None:
        connections = Connections(8, 600.0)
        async with served(connections) as address:
            held = [await asyncio.open_connection(*address) for _ in range(8)]
            for _, writer in held:
                writer.write(HALF)
            for _ in range(20):
                held.append(await asyncio.open_connection(*address))
                assert await ask(*held[-1]) == b"HTTP/1.1 200 OK"
                assert len(connections) <= 8
            # The last 8 are still there.
            for _, writer in held[-8:]:
                writer.close()
            for reader, writer in held[:-8]:
                await ended(reader)
                writer.close()

    asyncio.run(whole())


@pytest.mark.parametrize(("path", "parts"), [("/read", 10), ("/quiet", None)])
def test_an_answer_that_goes_on_stays_if_its_parts_are_read(path: str, parts: int | None) -> None:
    async def whole() -> None:
        async with served(Connections(8, 0.5), endless) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            body = b""
            with contextlib.suppress(ConnectionError):
                body = await asyncio.wait_for(reader.read(), PATIENCE)
            assert (body.count(b"part") == 10 and b"end" in body) is (parts == 10)
            writer.close()

    asyncio.run(whole())
