"""The load generator: sends the requests of a workload and records when each token arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pascaline.bench.stream import StreamError, post_stream
from pascaline.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.bench.stream import Endpoint
    from pascaline.bench.workload import Request

OnDone = Callable[["Record"], None]

_END = b"[DONE]"


@dataclass(slots=True)
class Record:
    """What happened to one request. Times in seconds."""

    started: float
    """When it was sent, seconds after the start of the run."""
    prompt_tokens: int
    output_tokens: int = 0
    """Output tokens as the server counts them; if it does not, the number of events with text."""
    late: float = 0.0
    """Seconds from its arrival time until it was sent: the generator's own delay."""
    ttft: float | None = None
    """Time to first token."""
    e2e: float | None = None
    """From sending until the whole answer had arrived."""
    itl: list[float] = field(default_factory=list)
    """Gaps between events with text. Each event is one token, unless the server sends several together."""
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for answers of one token."""
        if self.ttft is None or self.e2e is None or self.output_tokens < 2:
            return None
        return sum(self.itl) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Load:
    """The result of one run of the generator."""

    records: list[Record]
    seconds: float
    """Time from the first request to the end of the last."""
    cpu_seconds: float
    """CPU time of this process during the run, progress display included."""


class _Answer:
    """Collects the events of one answer."""

    def __init__(self, record: Record, sent: float) -> None:
        self._record = record
        self._sent = sent
        self._last: float | None = None
        self._usage: dict[str, int] = {}
        self._events = 0

    def on_event(self, now: float, data: bytes) -> None:
        """Record an event."""
        if data == _END:
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise StreamError(f"the server said: {redact(json.dumps(event['error']))[:300]}")
        self._usage = event.get("usage") or self._usage
        if not any(choice.get("text") for choice in event.get("choices", ())):
            return
        self._events += 1
        if self._last is None:
            self._record.ttft = now - self._sent
        else:
            self._record.itl.append(now - self._last)
        self._last = now

    def finish(self) -> None:
        """Record the end: the last event with text, because the events after it carry no token."""
        if self._last is None:
            raise StreamError("the answer had no text")
        self._record.e2e = self._last - self._sent
        self._record.prompt_tokens = self._usage.get("prompt_tokens", self._record.prompt_tokens)
        self._record.output_tokens = self._usage.get("completion_tokens", self._events)


async def send(endpoint: Endpoint, model: str, request: Request, began: float, timeout: float) -> Record:
    """Send one request and wait for its answer; an error becomes part of the record. began: perf_counter of the run."""
    sent = time.perf_counter()
    record = Record(sent - began, request.prompt_tokens)
    if request.at is not None:
        record.late = max(0.0, sent - began - request.at)
    answer = _Answer(record, sent)
    try:
        await post_stream(endpoint, "/v1/completions", completion_body(model, request), answer.on_event, timeout)
        answer.finish()
    except StreamError as error:
        record.error = str(error)
    return record


def completion_body(model: str, request: Request) -> dict[str, Any]:
    """Return a greedy request for exactly the wanted number of tokens."""
    return {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_load(
    endpoint: Endpoint,
    model: str,
    requests: Sequence[Request],
    *,
    concurrency: int | None,
    timeout: float,
    on_done: OnDone = lambda _: None,
) -> Load:
    """Send all requests: each at its arrival time or, if they have none, `concurrency` of them at any time."""
    cpu, began = time.process_time(), time.perf_counter()

    async def one(request: Request) -> Record:
        record = await send(endpoint, model, request, began, timeout)
        on_done(record)
        return record

    if concurrency is None:
        records = await _open_loop(requests, began, one)
    else:
        records = await _closed_loop(requests, concurrency, one)
    return Load(records, time.perf_counter() - began, time.process_time() - cpu)


async def _open_loop(requests: Sequence[Request], began: float, one: Any) -> list[Record]:
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request in requests:
            await asyncio.sleep(max(0.0, began + (request.at or 0.0) - time.perf_counter()))
            tasks.append(group.create_task(one(request)))
    return [task.result() for task in tasks]


async def _closed_loop(requests: Sequence[Request], concurrency: int, one: Any) -> list[Record]:
    waiting = iter(enumerate(requests))
    records: dict[int, Record] = {}

    async def worker() -> None:
        for number, request in waiting:
            records[number] = await one(request)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(worker())
    return [records[number] for number in sorted(records)]
