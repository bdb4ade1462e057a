"""The HTTP client of the load generator: any cut of the bytes gives the same events, and every failure has its words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.bench.load import Record, run_load, send
from pascaline.bench.stream import Endpoint, ResponseParser, StreamError, parse_endpoint
from pascaline.bench.workload import Request
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = Request([1, 2, 3], 3, 4)


def event(text: str, **more: object) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text}], **more})}\n\n".encode()


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


BODY = [event("a"), event(" b") + event(" c"), b"data: [DONE]\n\n"]
EVENTS = [
    b'{"choices": [{"text": "a"}]}',
    b'{"choices": [{"text": " b"}]}',
    b'{"choices": [{"text": " c"}]}',
    b"[DONE]",
]


def parse(pieces: list[bytes]) -> tuple[ResponseParser, list[bytes]]:
    events: list[bytes] = []
    parser = ResponseParser(lambda _, data: events.append(data))
    for piece in pieces:
        parser.feed(0.0, piece)
    parser.feed_eof()
    return parser, events


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_events_do_not_depend_on_how_the_bytes_arrive(places: list[int]) -> None:
    parser, events = parse(cut(HEAD + chunked(*BODY), places))
    assert events == EVENTS
    assert parser.complete


@given(st.lists(st.integers(0, 10_000), max_size=30), st.booleans())
def test_bodies_without_chunks_give_the_same_events(places: list[int], has_length: bool) -> None:
    body = b"".join(BODY)
    length = f"Content-Length: {len(body)}\r\n" if has_length else ""
    parser, events = parse(cut(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode() + body, places))
    assert events == EVENTS
    assert parser.complete


@given(st.lists(st.integers(0, 10_000), max_size=5), st.integers(1, len(chunked(*BODY)) - 1))
def test_a_cut_answer_is_never_taken_for_a_whole_one(places: list[int], missing: int) -> None:
    data = (HEAD + chunked(*BODY))[:-missing]
    parser, _ = parse(cut(data, places))
    # Up to the last size the whole body may have come.
    assert not parser.complete or missing <= len(b"\r\n")


@given(st.binary(max_size=300))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    with contextlib.suppress(StreamError):
        parse([data])


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("http://host:1/v1", "http://host:1"),
        ("https://host/", "https://host"),
        ("http://[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_endpoints_are_what_clients_are_given(text: str, url: str) -> None:
    assert parse_endpoint(text).url == url


def test_an_endpoint_knows_where_it_is() -> None:
    assert parse_endpoint("https://host").address == ("host", 443)
    assert parse_endpoint("[::1]:1").address == ("::1", 1)
    assert parse_endpoint("127.0.0.1:1").is_local
    assert not parse_endpoint("10.0.0.1:1").is_local


@pytest.mark.parametrize("text", ["ftp://host:1", "http://host:1/metrics", "http://", "http://host:1?x=1"])
def test_what_is_no_address_of_an_api_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_endpoint(text)
    assert str(caught.value) == f"--url: must be like http://127.0.0.1:30000, got {text!r}"


def test_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^--url: 'host:x' is not a URL: "):
        parse_endpoint("host:x")


# --- over a real socket -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Endpoint]:
    """A server with a fixed answer; its connections are closed in any case."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError):
                await answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "secret")
        for task in tasks - {None}:
            assert task is not None
            if not task.done():
                task.cancel()
        await asyncio.wait([task for task in tasks if task], timeout=10)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
    return head, await reader.readexactly(length)


def record_of(answer: Answer, timeout: float = 10.0) -> Record:
    async def main() -> Record:
        async with serving(answer) as endpoint:
            return await send(endpoint, "m", REQUEST, 0.0, timeout)

    return asyncio.run(main())


def raw(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        await writer.drain()

    return answer


def test_times_and_counts_of_an_answer_are_recorded() -> None:
    """The server's own count of tokens holds, as one event may carry several."""
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend(await read_request(reader))
        await asyncio.sleep(0.2)
        writer.write(HEAD + chunked(event("a"))[:-5])
        await asyncio.sleep(0.1)
        usage = event("", usage={"prompt_tokens": 7, "completion_tokens": 5})
        writer.write(chunked(event("b"), usage, b"data: [DONE]\n\n"))

    record = record_of(answer)
    assert record.error is None
    assert (record.prompt_tokens, record.output_tokens) == (7, 5)
    assert record.ttft is not None
    assert record.e2e is not None
    assert record.ttft >= 0.2
    assert len(record.itl) == 1
    assert record.itl[0] >= 0.09
    assert record.e2e == pytest.approx(record.ttft + record.itl[0])
    assert record.tpot == pytest.approx(record.itl[0] / 4)
    assert b"\r\nAuthorization: Bearer secret\r\n" in seen[0]
    assert json.loads(seen[1]) == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            b'HTTP/1.1 503 Busy\r\nContent-Length: 30\r\n\r\n{"message": "queue  is\n full"}\n',
            'status 503: {"message": "queue is full"}',
        ),
        (HEAD + chunked(event("a"))[:-5], "the server closed the connection in the middle of the answer"),
        (b"", "the server closed the connection in the middle of the answer"),
        (HEAD + chunked(b"data: [DONE]\n\n"), "the answer had no text"),
        (
            HEAD + chunked(b'data: {"error": {"message": "out of memory"}}\n\n'),
            'the server said: {"message": "out of memory"}',
        ),
        (b"220 smtp ready\r\n\r\n", "not an HTTP response: b'220 smtp ready'"),
        (HEAD + b"zz\r\n", "broken chunk size in the response: b'zz'"),
    ],
)
def test_every_failure_is_a_record_with_its_reason(data: bytes, error: str) -> None:
    assert record_of(raw(data)).error == error


def test_an_answer_that_is_no_json_is_a_failure() -> None:
    error = record_of(raw(HEAD + chunked(b"data: {nonsense\n\n"))).error
    assert error is not None
    assert error.startswith("broken event: JSONDecodeError(")


def test_an_answer_that_never_comes_ends_at_the_timeout() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await asyncio.sleep(3600)

    assert record_of(answer, timeout=0.2).error == "no complete answer within 0.2 s"


def test_a_server_that_is_not_there_is_a_failure_and_no_crash() -> None:
    record = asyncio.run(send(Endpoint("http://127.0.0.1:1"), "m", REQUEST, 0.0, 5.0))
    assert record.error is not None
    assert record.error.startswith("failed to connect to 127.0.0.1:1: ")


def test_a_closed_loop_keeps_exactly_so_many_requests_under_way() -> None:
    now, most = 0, 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        await read_request(reader)
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.05)
        now -= 1
        writer.write(HEAD + chunked(event("a")))

    async def main() -> list[Record]:
        async with serving(answer) as endpoint:
            load = await run_load(endpoint, "m", [REQUEST] * 12, concurrency=3, timeout=10)
            return load.records

    records = asyncio.run(main())
    assert most == 3
    assert [record.error for record in records] == [None] * 12


def test_an_open_loop_sends_at_the_arrival_times_whatever_the_answers_take() -> None:
    """A server that answers slowly must not slow down the arrivals: that would hide its latency."""
    arrived: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(asyncio.get_running_loop().time())
        await read_request(reader)
        await asyncio.sleep(0.6)
        writer.write(HEAD + chunked(event("a")))

    async def main() -> list[Record]:
        async with serving(answer) as endpoint:
            requests = [Request("x", 1, 1, at=0.1 * number) for number in range(6)]
            return (await run_load(endpoint, "m", requests, concurrency=None, timeout=10)).records

    records = asyncio.run(main())
    assert all(record.started >= 0.1 * number for number, record in enumerate(records))
    # The last arrived before the first had been answered.
    assert arrived[-1] - arrived[0] < 0.6
