"""Compares the load generator of `pascaline bench` with SGLang's bench_serving, on the same server, in turns.

    python benchmarks/bench_load.py [--server fake|sglang|URL] [--rounds 5] [--concurrency 4] [--output FILE.md]

fake: the tests' fake engine, whose tokens come at fixed intervals, so any difference comes from the generators, not the
server. sglang: the built-in model on this machine. Each round runs both generators, and every second round swaps their
order; both send the same number of requests of the same lengths. The second table is the CPU time of the generator at
the rate of a Tesla P4 (about 200 tokens/s with 8 concurrent requests), beside the same generator with h11 as parser, in
turns, and beside httpx with the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
from pascaline.bench import stream
from pascaline.bench.load import completion_body, run_load
from pascaline.bench.server import describe, make_prompts
from pascaline.bench.stream import Endpoint
from pascaline.bench.workload import Prompts, make_requests, parse_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
FAKE_ENGINE = ROOT / "tests/fake_engine/fake_engine.py"
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
START_SECONDS = 300.0
P4_TOKENS_PER_SECOND, P4_BATCH = 200, 8
"""Published figures of the P40 scaled to the P4 (8B Q4, 16 concurrent requests), rounded up."""
FIGURES = {
    "TTFT": ("mean_ttft_ms", "median_ttft_ms"),
    "TPOT": ("mean_tpot_ms", "median_tpot_ms"),
    "E2E": ("mean_e2e_latency_ms", "median_e2e_latency_ms"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="fake")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with server(arguments.server) as url, prepared_tokenizer() as tokenizer:
        lines = compare(Endpoint(url), tokenizer, arguments)
    if arguments.server == "fake":
        with fake(P4_TOKENS_PER_SECOND / P4_BATCH) as url:
            lines += ["", *cpu_table(Endpoint(url), arguments.rounds)]
    lines += [
        "",
        f"{platform.node()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, server: {arguments.server}",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def compare(endpoint: Endpoint, tokenizer: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the lines of the table of latencies."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    generators = [
        (ours, lambda seed: measure_ours(endpoint, arguments, seed)),
        (theirs, lambda seed: measure_theirs(endpoint, tokenizer, arguments, seed)),
    ]
    for found, measure in generators:
        measure(999)  # warm-up of both sides
        found.clear()
    for round_ in range(arguments.rounds):
        for found, measure in generators[:: -1 if round_ % 2 else 1]:
            found.append(measure(round_))
    lines = [
        f"{arguments.rounds} rounds of {arguments.requests} requests, {arguments.concurrency} at once, "
        f"{PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens; ms, mean over rounds",
        "",
        "| | pascaline bench | bench_serving | difference |",
        "|---|---|---|---|",
    ]
    for key in [name for pair in FIGURES.values() for name in pair] + ["output_throughput"]:
        a, b = (statistics.fmean(each[key] for each in side) for side in (ours, theirs))
        lines.append(f"| {key} | {a:.2f} | {b:.2f} | {a / b - 1:+.2%} |")
    return lines


def measure_ours(endpoint: Endpoint, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run our generator once; name the figures as bench_serving does."""
    described = describe(endpoint)
    lengths = [parse_lengths("", str(count)) for count in (PROMPT_TOKENS, OUTPUT_TOKENS)]
    requests = make_requests(
        make_prompts(endpoint, described), lengths[0], lengths[1], arguments.requests, random.Random(seed)
    )
    load = asyncio.run(run_load(endpoint, described.model, requests, concurrency=arguments.concurrency, timeout=600))
    errors = [record.error for record in load.records if record.error]
    if errors:
        sys.exit(f"our generator: {errors[0]}")
    found = {"output_throughput": sum(record.output_tokens for record in load.records) / load.seconds}
    for name, attribute in (("ttft", "ttft"), ("tpot", "tpot"), ("e2e_latency", "e2e")):
        values = [getattr(record, attribute) * 1e3 for record in load.records]
        found |= {f"mean_{name}_ms": statistics.fmean(values), f"median_{name}_ms": statistics.median(values)}
    return found


def measure_theirs(endpoint: Endpoint, tokenizer: Path, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Run SGLang's bench_serving once."""
    host, port = endpoint.address
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as output, stand_in_for_datasets() as modules:
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai", "--host", host]
        command += ["--port", str(port), "--model", describe(endpoint).model, "--tokenizer", str(tokenizer)]
        command += [
            "--dataset-name",
            "random-ids",
            "--random-range-ratio",
            "1",
            "--random-input-len",
            str(PROMPT_TOKENS),
        ]
        command += ["--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(arguments.requests)]
        command += ["--max-concurrency", str(arguments.concurrency), "--seed", str(seed), "--disable-tqdm"]
        command += ["--output-file", output.name, "--warmup-requests", "0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(modules)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        text = Path(output.name).read_text()
    if done.returncode or not text:
        sys.exit(f"bench_serving ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    found: dict[str, float] = json.loads(text.splitlines()[-1])
    return found


@contextlib.contextmanager
def stand_in_for_datasets() -> Iterator[Path]:
    """Give a folder with a module `datasets`: bench_serving imports it, but uses it only for data from the network."""
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("datasets") is None:
            (Path(folder) / "datasets.py").write_text("load_dataset = None\n")
        yield Path(folder)


# --- CPU time ---------------------------------------------------------------------------------------------------------


class H11Parser:
    """What stream.ResponseParser does, by h11."""

    def __init__(self, on_event: Callable[[float, bytes], None]) -> None:
        self.status, self.complete, self.error_body = 0, False, b""
        self._on_event, self._line = on_event, b""
        self._connection = h11.Connection(h11.CLIENT, stream.MAX_HEAD_BYTES)
        # h11 reads a response only after a request; the real one is sent without it.
        self._connection.send(h11.Request(method="POST", target="/", headers=[("Host", "h"), ("Connection", "close")]))
        self._connection.send(h11.EndOfMessage())

    def feed(self, now: float, data: bytes) -> None:
        """Read bytes that arrived at a time."""
        self._connection.receive_data(data)
        while not self.complete and (event := self._connection.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Data):
                *lines, self._line = (self._line + event.data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self._on_event(now, line[5:].strip())
            elif isinstance(event, h11.Response):
                self.status = event.status_code
            self.complete = isinstance(event, h11.EndOfMessage)

    def feed_eof(self) -> None:
        """Record that the server closed the connection."""


def cpu_table(endpoint: Endpoint, rounds: int) -> list[str]:
    """Return the lines of the table of what it costs to generate load."""
    lengths = parse_lengths("", "64")
    requests = make_requests(Prompts(range(1000, 3000)), lengths, lengths, 4 * P4_BATCH, random.Random(1))
    model, parsers = describe(endpoint).model, (stream.ResponseParser, H11Parser)
    shares: dict[type, list[float]] = {parser: [] for parser in parsers}
    for round_ in range(rounds):
        for parser in parsers[:: -1 if round_ % 2 else 1]:
            stream.ResponseParser = parser
            load = asyncio.run(run_load(endpoint, model, requests, concurrency=P4_BATCH, timeout=600))
            shares[parser].append(load.cpu_seconds / load.seconds)
    ours, with_h11 = map(statistics.median, shares.values())
    rate = sum(record.output_tokens for record in load.records) / load.seconds
    other = asyncio.run(httpx_cpu_ratio(endpoint, requests))
    return [
        f"Generator's CPU time at {rate:.0f} tokens/s, {P4_BATCH} requests at once, median of {rounds} rounds in turns",
        "",
        "| | share of one core |",
        "|---|---|",
        f"| pascaline bench | {ours:.2%} |",
        f"| the same with h11 as parser | {with_h11:.2%} ({with_h11 / ours - 1:+.0%}) |",
        f"| httpx, the same requests, once | {other:.2%} |",
    ]


async def httpx_cpu_ratio(endpoint: Endpoint, requests: list[Any]) -> float:
    """Return the share of CPU time of a generator on httpx that records the same."""
    import httpx

    model = describe(endpoint).model
    waiting = iter(requests)
    stamps: list[float] = []

    def record(line: str) -> None:
        if line.startswith("data: {") and any(choice["text"] for choice in json.loads(line[6:])["choices"]):
            stamps.append(time.perf_counter())

    async def worker(client: httpx.AsyncClient) -> None:
        for request in waiting:
            url = f"{endpoint.url}/v1/completions"
            async with client.stream("POST", url, json=completion_body(model, request)) as answer:
                async for line in answer.aiter_lines():
                    record(line)

    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(P4_BATCH)))
        return (time.process_time() - cpu) / (time.perf_counter() - began)


# --- servers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(name: str) -> Iterator[str]:
    """Give the URL of the requested server."""
    if name == "fake":
        with fake(25.0) as url:
            yield url
    elif name == "sglang":
        port = free_port()
        command = ["-m", "pascaline", "serve", "--port", str(port), "--agent-port", str(free_port())]
        with child([sys.executable, *command], f"http://127.0.0.1:{port}", {}) as url:
            yield url
    else:
        yield name


@contextlib.contextmanager
def fake(tokens_per_second: float) -> Iterator[str]:
    """Run the fake engine; tokens_per_second: for each request."""
    port = free_port()
    faults = f"decode_tokens_per_second={tokens_per_second}"
    command = [sys.executable, str(FAKE_ENGINE), "-m", "sglang.launch_server", "--model-path", "fake"]
    with child([*command, "--port", str(port)], f"http://127.0.0.1:{port}", {"FAKE_ENGINE_FAULTS": faults}) as url:
        yield url


@contextlib.contextmanager
def child(command: list[str], url: str, environment: dict[str, str]) -> Iterator[str]:
    """Run a server until the block ends."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"failed to start {' '.join(command)}: exit code {process.poll()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def ready(url: str) -> bool:
    """Whether a server has finished starting."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        return answer.status == 200
    return False


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def prepared_tokenizer() -> Iterator[Path]:
    """Give the built-in model's tokenizer as a folder, with which bench_serving makes prompts."""
    from pascaline.models.resolve import builtin_model

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "prepared"
        digest = hashlib.sha256(builtin_model().read_bytes()).hexdigest()
        command = [
            sys.executable,
            "-m",
            "sglang_pascal",
            "prepare",
            str(builtin_model()),
            str(target),
            "--sha256",
            digest,
        ]
        subprocess.run(command, check=True, capture_output=True)
        yield target


if __name__ == "__main__":
    main()
