"""What `pascaline serve` costs: time to ready, memory, latency of the agent, and tokens/s beside two references.

    python benchmarks/serve.py [--runs 3] [--tokens 64] [--json FILE] > docs/results/serve.md

References, on the same model file and CPU, one server at a time:
  plain SGLang   `python -m sglang.launch_server` with the same plugin and the very arguments that pascaline chose
  llama-server   the same through `pascaline serve --engine llama.cpp`; left out, with a note, where it is not on PATH

Then the plain SGLang again in float32 and bfloat16, with one thread and with one a core: whether pascaline's choice for
this CPU is the fastest.

Once more with a busy loop for every core beside it, which is how a shared machine is.

The first start fills every cache; the figures are those of the second. Tokens/s is the sum over the concurrent requests
of tokens generated / time from the first request's start to the last one's end: the median over the runs, greedy,
end-of-sequence ignored, prompts that differ from their first token on.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

API_PORT, AGENT_PORT = 31400, 31401
CONCURRENCIES = (1, 4, 8)
AGENT_REQUESTS = 500
START_TIMEOUT_SECONDS = 600.0
MODEL = "SmolLM2-135M-Instruct"
OURS_BUSY = "pascaline serve, every core busy with another program"
OURS, PLAIN, LLAMA = "pascaline serve", "plain SGLang, same plugin and arguments", "llama-server, same file"
DTYPES = ("float32", "bfloat16")
TOPICS = ("rivers", "bread", "glass", "clocks", "bridges", "salt", "maps", "wool")


def main() -> None:
    """Measure, and print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each throughput (default: 3)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each request (default: 64)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    figures: dict[str, Any] = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    figures["load_before"] = os.getloadavg()[0]
    throughput = figures["tokens_per_second"] = {}
    started = time.perf_counter()
    with pascaline():
        figures["seconds_to_first_answer"] = {"first start": seconds_to_answer(started)}
        command = engine_command()
    figures["dtype"] = command[command.index("--dtype") + 1]
    started = time.perf_counter()
    with pascaline() as pid:
        figures["seconds_to_ready"] = time.perf_counter() - started
        figures["seconds_to_first_answer"]["second start"] = seconds_to_answer(started)
        figures["stages_seconds"] = stages()
        figures["agent_resident_bytes"] = resident_bytes(pid)
        figures["latency_seconds"] = {path: latencies(path) for path in ("/readyz", "/metrics")}
        throughput[OURS] = measure(arguments.runs, arguments.tokens)
        with busy_cores():
            throughput[OURS_BUSY] = measure(arguments.runs, arguments.tokens)
    with plain(command):
        throughput[PLAIN] = measure(arguments.runs, arguments.tokens)
    figures["settings_tokens_per_second"] = sweep(command, arguments.tokens)
    if shutil.which("llama-server"):
        with pascaline("--engine", "llama.cpp"):
            throughput[LLAMA] = measure(arguments.runs, arguments.tokens)
    figures["load_after"] = os.getloadavg()[0]
    print(report(figures, arguments.runs, arguments.tokens))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def report(figures: dict[str, Any], runs: int, tokens: int) -> str:
    """Return the figures beside their aims, as Markdown."""
    memory = figures["agent_resident_bytes"] / 2**20
    rows, answers_after = figures["tokens_per_second"], figures["seconds_to_first_answer"]
    stage_rows = [
        ("ready, of it " + name, f"{seconds:.1f} s", "") for name, seconds in figures["stages_seconds"].items()
    ]
    latency_rows = [
        (f"`{path}`, p50 and p99", f"{p50 * 1e3:.2f} ms, {p99 * 1e3:.2f} ms", "p99 at most 5 ms")
        for path, (p50, p99) in figures["latency_seconds"].items()
    ]
    measured = [
        ("command to ready, warm cache", f"{figures['seconds_to_ready']:.1f} s", "40 s on 2 cores"),
        *((f"command to first answer, {kind}", f"{seconds:.1f} s", "") for kind, seconds in answers_after.items()),
        *stage_rows,
        ("resident memory of supervisor and agent", f"{memory:.1f} MiB", "at most 60 MiB"),
        *latency_rows,
    ]
    speeds = [(name, *(f"{row[n]:.1f}" for n in CONCURRENCIES)) for name, row in rows.items()]
    ratios = [
        (f"pascaline / {name}", *(f"{rows[OURS][n] / row[n]:.2f}" for n in CONCURRENCIES))
        for name, row in rows.items()
        if name != OURS
    ]
    left_out = [] if LLAMA in rows else [f"\n{LLAMA} is not on PATH: left out.\n"]
    return "\n".join(
        [
            "# What `pascaline serve` costs\n",
            f"{figures['cpu']}, {figures['cores']} cores; {MODEL} (GGUF) computed in {figures['dtype']} with "
            f"{figures['cores']} threads; `benchmarks/serve.py`.",
            f"Load average of the machine over 1 minute: {figures['load_before']:.1f} before, "
            f"{figures['load_after']:.1f} after.\n",
            *table(("what", "measured", "aim"), measured),
            f"\nTokens/s of all requests together, {tokens} tokens each, median of {runs}:\n",
            *table(("concurrent requests", *map(str, CONCURRENCIES)), [*speeds, *ratios]),
            *left_out,
            f"\nThe plain SGLang in every number type and number of threads; pascaline takes {figures['dtype']} with "
            f"{figures['cores']} threads here, once each:\n",
            *table(
                ("number type, threads", *map(str, CONCURRENCIES)),
                [
                    (setting, *(f"{row[n]:.1f}" for n in CONCURRENCIES))
                    for setting, row in figures["settings_tokens_per_second"].items()
                ],
            ),
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


@contextmanager
def pascaline(*extra: str) -> Iterator[int]:
    """Run `pascaline serve` until the block ends; yields its process ID once it is ready."""
    command = [sys.executable, "-m", "pascaline", "serve", "--card", "cpu", *extra]
    command += ["--port", str(API_PORT), "--agent-port", str(AGENT_PORT)]
    with running(command, "/readyz", AGENT_PORT) as pid:
        yield pid


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with another program until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def seconds_to_answer(started: float) -> float:
    """Ask for one short answer; return the time since `started` when it is there."""
    generate("What is the capital of France?", 8)
    return time.perf_counter() - started


@contextmanager
def plain(command: list[str], threads: int | None = None) -> Iterator[int]:
    """Run the engine by itself until the block ends; threads: None = one a core."""
    with running(command, "/health_generate", API_PORT, threads) as pid:
        yield pid


def sweep(command: list[str], tokens: int) -> dict[str, dict[int, float]]:
    """Return tokens/s of the engine with each number type and number of threads."""
    cores = len(os.sched_getaffinity(0))
    at, found = command.index("--dtype") + 1, {}
    for dtype in DTYPES:
        for threads in sorted({1, cores}):
            with plain([*command[:at], dtype, *command[at + 1 :]], threads):
                found[f"{dtype}, {threads}"] = measure(1, tokens)
    return found


@contextmanager
def running(command: list[str], path: str, port: int, threads: int | None = None) -> Iterator[int]:
    """Run a server until the block ends; yields once GET path answers 200."""
    environment = {**os.environ, "SGLANG_PLATFORM": "pascal", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0)))}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    print(f"starting: {' '.join(command)}", file=sys.stderr)
    log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed at the end of the process
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not answers(path, port):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise SystemExit(f"serve.py: not ready: {' '.join(command)}\n{log.read()[-2000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def engine_command() -> list[str]:
    """Return the command line of the engine that pascaline runs now."""
    pid = json.loads(get("/health", AGENT_PORT))["engine_pid"]
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")


def stages() -> dict[str, float]:
    """Return the duration of each stage, in seconds, from the agent's metrics."""
    name = "pascaline_time_to_ready_seconds{stage="
    lines = [line for line in get("/metrics", AGENT_PORT).decode().splitlines() if line.startswith(name)]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


def resident_bytes(pid: int) -> int:
    """Return VmRSS."""
    with Path(f"/proc/{pid}/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def latencies(path: str) -> tuple[float, float]:
    """Return the median and the 99th percentile of GET path on the agent, on one connection, in seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", AGENT_PORT)
    seconds = []
    for _ in range(AGENT_REQUESTS):
        started = time.perf_counter()
        connection.request("GET", path)
        connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
    connection.close()
    return statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]


def measure(runs: int, tokens: int) -> dict[int, float]:
    """Return tokens/s for each concurrency; a first round that is not counted warms up."""
    generate_together(max(CONCURRENCIES), tokens, 0)
    return {n: statistics.median(generate_together(n, tokens, 1 + run) for run in range(runs)) for n in CONCURRENCIES}


def generate_together(concurrency: int, tokens: int, run: int) -> float:
    """Return tokens/s of so many requests at once."""
    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        counts = list(pool.map(lambda i: generate(f"{run} {TOPICS[i]}: a story.", tokens), range(concurrency)))
        return sum(counts) / (time.perf_counter() - started)


def generate(prompt: str, tokens: int) -> int:
    """Return how many tokens one completion has."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["usage"]["completion_tokens"])


def answers(path: str, port: int) -> bool:
    """Whether GET path is answered by 200."""
    try:
        get(path, port)
    except OSError:
        return False
    return True


def get(path: str, port: int) -> bytes:
    """Return the answer; ConnectionError where it is not a 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise ConnectionError(f"{path}: {answer.status}")
        return answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def cpu_name() -> str:
    """Return the CPU's name as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
