"""What `pascaline serve` costs: time to ready, memory, latency of the agent, and tokens/s beside two references.

    python benchmarks/serve.py [--runs 3] [--tokens 64] [--json FILE]

References, on the same model file and CPU, one server at a time:
  plain SGLang   `python -m sglang.launch_server` with the same plugin and the very arguments that pascaline chose
  llama-server   the same through `pascaline serve --engine llama.cpp`; left out, with a note, where it is not on PATH

A first start that is not counted fills every cache. Tokens/s is the sum over the concurrent requests of tokens
generated / time from the first request's start to the last one's end: the median over the runs, greedy, end-of-sequence
ignored, prompts that differ from their first token on.
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
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

API_PORT, AGENT_PORT = 31400, 31401
CONCURRENCIES = (1, 4, 8)
AGENT_REQUESTS = 500
START_TIMEOUT_SECONDS = 600.0
MODEL = "SmolLM2-135M-Instruct"
TOPICS = ("rivers", "bread", "glass", "clocks", "bridges", "salt", "maps", "wool")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each throughput (default: 3)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated for each request (default: 64)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    with pascaline():
        command = engine_command()
    figures: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count(), "tokens_per_second": {}}
    throughput = figures["tokens_per_second"]
    started = time.perf_counter()
    with pascaline() as pid:
        figures["seconds_to_ready"] = time.perf_counter() - started
        figures["stages_seconds"] = stages()
        figures["agent_resident_bytes"] = resident_bytes(pid)
        figures["latency_seconds"] = {path: latencies(path) for path in ("/readyz", "/metrics")}
        throughput["pascaline serve"] = measure(arguments.runs, arguments.tokens)
    with plain(command):
        throughput["plain SGLang"] = measure(arguments.runs, arguments.tokens)
    if shutil.which("llama-server"):
        with pascaline("--engine", "llama.cpp"):
            throughput["llama-server"] = measure(arguments.runs, arguments.tokens)
    report(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def report(figures: dict[str, Any]) -> None:
    """Print the figures beside their aims."""
    stage_text = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["stages_seconds"].items())
    print(f"\n{figures['cpu']}, {figures['cores']} cores\n")
    print(f"command to ready, warm     {figures['seconds_to_ready']:8.1f} s      ({stage_text}; aim: 40 s on 2 cores)")
    print(f"agent's resident memory    {figures['agent_resident_bytes'] / 2**20:8.1f} MiB    (aim: 60 MiB)")
    for path, (p50, p99) in figures["latency_seconds"].items():
        print(f"{path:<26} {p50 * 1e3:8.2f} ms p50, {p99 * 1e3:.2f} ms p99 (aim: 5 ms p99)")
    rows = figures["tokens_per_second"]
    print("\ntokens/s at concurrency    " + "".join(f"{n:>10}" for n in CONCURRENCIES))
    for name, row in rows.items():
        print(f"{name:<27}" + "".join(f"{row[n]:10.1f}" for n in CONCURRENCIES))
    ours = rows["pascaline serve"]
    for name in ("plain SGLang", "llama-server"):
        if name in rows:
            print(f"ratio to {name:<18}" + "".join(f"{ours[n] / rows[name][n]:10.2f}" for n in CONCURRENCIES))
        else:
            print(f"{name}: not on PATH, left out")


@contextmanager
def pascaline(*extra: str) -> Iterator[int]:
    """Run `pascaline serve` until the block ends; yields its process ID once it is ready."""
    command = [sys.executable, "-m", "pascaline", "serve", "--card", "cpu", *extra]
    command += ["--port", str(API_PORT), "--agent-port", str(AGENT_PORT)]
    with running(command, "/readyz", AGENT_PORT) as pid:
        yield pid


@contextmanager
def plain(command: list[str]) -> Iterator[int]:
    """Run the engine by itself until the block ends."""
    with running(command, "/health_generate", API_PORT) as pid:
        yield pid


@contextmanager
def running(command: list[str], path: str, port: int) -> Iterator[int]:
    """Run a server until the block ends; yields once GET path answers 200."""
    environment = {**os.environ, "SGLANG_PLATFORM": "pascal", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not answers(path, port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"serve.py: not ready: {' '.join(command)}")
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
