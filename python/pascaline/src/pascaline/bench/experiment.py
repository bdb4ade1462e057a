"""Describes what to measure: the points of a sweep, their requests, and how often each point is repeated."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pascaline.bench.workload import arrival_times, make_requests, parse_lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.bench.workload import Arrival, Prompts, Request, Workload
    from pascaline.engines.server import Server

ROUNDS = 4
"""Requests per concurrent slot if the user sets none: enough that the start and the end of a run weigh little."""
MIN_REQUESTS = 8
SERVE_REQUESTS = 32
CONTEXT_REQUESTS = 4
WARMUP_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of a sweep."""

    name: str
    axis: float
    """The point's place on the sweep's axis: batch size, context length, or requests per second."""
    prompt_tokens: str
    """Distribution, see workload.Lengths."""
    output_tokens: str
    requests: int
    """Number of requests in each run."""
    concurrency: int | None = None
    """Requests in flight at any time; None: they arrive at `rate`."""
    rate: float | None = None
    """Requests per second."""
    arrival: Arrival = "poisson"
    workload: Workload = "free"
    """free: answers go on with a story; edit and quote: they repeat what the prompt has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A sweep."""

    kind: str
    """`batch`, `context`, `serve` or `quant`."""
    points: tuple[Point, ...]
    repeats: int
    seed: int
    timeout: float
    """Most seconds that one request may take."""

    def to_json(self) -> dict[str, Any]:
        """Return everything that decides what is sent."""
        return asdict(self) | {"points": [asdict(point) for point in self.points]}


def batch_points(sizes: Sequence[int], prompt: str, output: str, requests: int | None) -> tuple[Point, ...]:
    """Return a point per number of concurrent requests."""
    return tuple(
        Point(
            name=f"batch {size}",
            axis=size,
            prompt_tokens=prompt,
            output_tokens=output,
            requests=requests or max(MIN_REQUESTS, ROUNDS * size),
            concurrency=size,
        )
        for size in sizes
    )


def context_points(lengths: Sequence[int], output: int, requests: int | None) -> tuple[Point, ...]:
    """Return a point per context length. One request at a time; prompt and answer together fill the context."""
    return tuple(
        Point(
            name=f"context {length}",
            axis=length,
            prompt_tokens=str(length - output),
            output_tokens=str(output),
            requests=requests or CONTEXT_REQUESTS,
            concurrency=1,
        )
        for length in lengths
    )


def serve_points(
    rates: Sequence[float],
    arrival: Arrival,
    prompt: str,
    output: str,
    requests: int | None,
    workload: Workload = "free",
) -> tuple[Point, ...]:
    """Return a point per arrival rate."""
    return tuple(
        Point(
            name=f"{rate:g} requests/s" if workload == "free" else f"{workload}, {rate:g} requests/s",
            axis=rate,
            prompt_tokens=prompt,
            output_tokens=output,
            requests=requests or SERVE_REQUESTS,
            rate=rate,
            arrival=arrival,
            workload=workload,
        )
        for rate in rates
    )


def requests_of(point: Point, prompts: Prompts, seed: str) -> list[Request]:
    """Return the requests of one run; the same for the same seed and tokeniser."""
    source = random.Random(seed)  # noqa: S311 - no secret
    prompt, output = (
        parse_lengths("prompt_tokens", point.prompt_tokens),
        parse_lengths("output_tokens", point.output_tokens),
    )
    requests = make_requests(prompts, prompt, output, point.requests, source, point.workload)
    if point.rate is None:
        return requests
    times = arrival_times(point.arrival, point.rate, point.requests, source)
    return [
        type(request)(request.prompt, request.prompt_tokens, request.output_tokens, at)
        for request, at in zip(requests, times, strict=True)
    ]


def warmup_of(point: Point, prompts: Prompts, seed: str) -> list[Request]:
    """Return requests that use every part of the engine once: prompts of full length, short answers."""
    count = min(point.requests, point.concurrency or 2)
    return [
        type(request)(request.prompt, request.prompt_tokens, min(request.output_tokens, WARMUP_OUTPUT_TOKENS))
        for request in requests_of(point, prompts, seed)[:count]
    ]


def reason_to_skip(point: Point, server: Server) -> str | None:
    """Return why a server cannot be measured at a point; None if it can."""
    prompt, output = (
        parse_lengths("prompt_tokens", point.prompt_tokens),
        parse_lengths("output_tokens", point.output_tokens),
    )
    total = prompt.typical + output.typical
    if server.context_length is not None and total > server.context_length:
        return f"needs a context of {total} tokens, the server has {server.context_length}"
    if point.concurrency and server.max_running_requests and point.concurrency > server.max_running_requests:
        return f"needs {point.concurrency} requests at once, the server runs {server.max_running_requests}"
    return None
