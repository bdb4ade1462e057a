"""Compares `pascaline exporter` with nvidia_gpu_exporter and nvitop-exporter on the same simulated NVML with 8 GPUs.

    python benchmarks/exporter.py [--scrapes 300] [--seconds 15] [--output docs/results/exporter.md]

Latency: scrapes 50 ms apart over a kept connection, as Prometheus makes them. Memory and CPU: at one scrape a second,
of the exporter and all its child processes. Peers are taken from PATH and left out if they are missing.
"""

from __future__ import annotations

import argparse
import http.client
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment

GPUS = 8
ROUNDS = 3
PAUSE_SECONDS = 0.05
START_SECONDS = 60.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Exporter:
    """How one exporter is started; PORT is replaced by its port."""

    name: str
    command: tuple[str, ...]
    series: str
    """Name of a metric that is on its page once it has read the GPUs."""
    mode: str


EXPORTERS = (
    Exporter(
        "pascaline exporter",
        (sys.executable, "-m", "pascaline", "exporter", "--port=PORT"),
        "nvidia_gpu_temperature_gpu",
        "reads every second",
    ),
    Exporter(
        "nvidia_gpu_exporter",
        (
            "nvidia_gpu_exporter",
            "--web.listen-address=127.0.0.1:PORT",
            "--collect.backend=nvml",
            "--collect.interval=1s",
        ),
        "nvidia_smi_temperature_gpu",
        "NVML, reads every second",
    ),
    Exporter(
        "nvidia_gpu_exporter",
        ("nvidia_gpu_exporter", "--web.listen-address=127.0.0.1:PORT", "--collect.backend=nvml"),
        "nvidia_smi_temperature_gpu",
        "NVML, reads at each scrape",
    ),
    Exporter("nvitop-exporter", ("nvitop-exporter", "--port=PORT"), "gpu_temperature", "reads every second"),
)


@dataclass(frozen=True)
class Result:
    """The measurements of one exporter."""

    p50_ms: float
    p99_ms: float
    resident_mib: float
    cpu_percent: float
    series: float
    page_kib: float


def scenario() -> str:
    """Return a scenario with the demo's card eight times."""
    head = DEMO_SCENARIO.read_text().partition("[gpu 0]")[0]
    cards = (
        f"[gpu {n}]\nnvmlDeviceGetUUID = GPU-00000000-0000-4000-8000-{n:012}\n"
        f"nvmlDeviceGetPciInfo = 00000000:{n + 16:02X}:00.0 0x1BB310DE 0x11D810DE\n"
        f"nvmlDeviceGetSerial = 032000000000{n}\nnvmlDeviceGetMinorNumber = {n}\n"
        for n in range(GPUS)
    )
    return head + "\n".join(cards)


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(child))]


def resident_mib(pid: int) -> float:
    """Return the resident memory of a family; pages that two of them share count twice."""
    pages = sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) for member in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a family so far."""
    total = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_SECOND


def scrape(connection: http.client.HTTPConnection) -> tuple[float, str]:
    """Scrape once; return its time in seconds, and the page."""
    began = time.perf_counter()
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    page = answer.read()
    took = time.perf_counter() - began
    if answer.status != 200:
        raise RuntimeError(f"the exporter answered {answer.status}: {page[:200]!r}")
    return took, page.decode()


def wait_until_read(port: int, series: str) -> str:
    """Return the first page that has the metric for each GPU."""
    deadline = time.monotonic() + START_SECONDS
    page = ""
    while time.monotonic() < deadline:
        try:
            page = scrape(http.client.HTTPConnection("127.0.0.1", port, timeout=10))[1]
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            page = str(error)
        if sum(line.startswith(series) for line in page.splitlines()) >= GPUS:
            return page
        time.sleep(0.2)
    raise RuntimeError(f"no {series} of {GPUS} GPUs within {START_SECONDS:g} s; last: {page[:300]!r}")


def measure(exporter: Exporter, environment: dict[str, str], scrapes: int, seconds: int) -> Result:
    """Start one exporter, measure it and stop it."""
    port = free_port()
    command = [part.replace("PORT", str(port)) for part in exporter.command]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            page = wait_until_read(port, exporter.series)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            latencies = []
            for _ in range(scrapes):
                latencies.append(scrape(connection)[0] * 1e3)
                time.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))  # scrapes meet readings by chance
            resident, cpu = steady_state(process.pid, connection, seconds)
        finally:
            process.terminate()
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    samples = sum(1 for line in page.splitlines() if line and not line.startswith("#"))
    return Result(cuts[49], cuts[98], resident, cpu, samples, len(page) / 1024)


def steady_state(pid: int, connection: http.client.HTTPConnection, seconds: int) -> tuple[float, float]:
    """Return the largest resident memory in MiB and the mean CPU in percent of a core, at one scrape a second."""
    before, began, largest = cpu_seconds(pid), time.monotonic(), 0.0
    for _ in range(seconds):
        scrape(connection)
        largest = max(largest, resident_mib(pid))
        time.sleep(1.0)
    return largest, 100 * (cpu_seconds(pid) - before) / (time.monotonic() - began)


def report(scrapes: int, seconds: int) -> str:
    """Measure all in rounds, so that a busy minute of the machine does not spoil one exporter; return the page."""
    results: list[list[Result | str]] = [[] for _ in EXPORTERS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eight.nvml"
        path.write_text(scenario())
        environment = fake_nvml_environment(path)
        for number in range(1, ROUNDS + 1):
            for exporter, found in zip(EXPORTERS, results, strict=True):
                found.append(attempt(exporter, environment, scrapes, seconds))
                print(f"round {number} of {ROUNDS}: {exporter.name}: {found[-1]}", file=sys.stderr, flush=True)
    lines = [
        "# Scrape latency, memory and CPU of GPU exporters",
        "",
        f"{GPUS} simulated GPUs (Tesla P4), {scrapes} scrapes for latency, "
        f"{seconds} s at one scrape a second for memory and CPU, median of {ROUNDS} rounds; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, Linux {platform.release().split('-')[0]}; "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, `benchmarks/exporter.py`.",
        "Resident memory is that of all processes of the exporter together.",
        "",
        "| exporter | mode | p50 (ms) | p99 (ms) | resident (MiB) | CPU (% of a core) | samples | page (KiB) |",
        "|---|---|---|---|---|---|---|---|",
        *(row(exporter, found) for exporter, found in zip(EXPORTERS, results, strict=True)),
    ]
    return "\n".join(lines) + "\n"


def attempt(exporter: Exporter, environment: dict[str, str], scrapes: int, seconds: int) -> Result | str:
    """Return the figures of one exporter, or why there are none."""
    if not shutil.which(exporter.command[0]):
        return f"no {exporter.command[0]} on PATH"
    try:
        return measure(exporter, environment, scrapes, seconds)
    except (OSError, RuntimeError) as error:
        return str(error)


def row(exporter: Exporter, found: list[Result | str]) -> str:
    """Return the table's row for one exporter: the median of each figure, or why there is none."""
    start = f"| {exporter.name} | {exporter.mode} |"
    results = [result for result in found if isinstance(result, Result)]
    if not results:
        return f"{start} not measured: {found[0]} | | | | | |"
    m = Result(*(statistics.median(figures) for figures in zip(*map(astuple, results), strict=True)))
    timed = f"{m.p50_ms:.2f} | {m.p99_ms:.2f} | {m.resident_mib:.1f} | {m.cpu_percent:.1f}"
    return f"{start} {timed} | {m.series:.0f} | {m.page_kib:.0f} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scrapes", type=int, default=300, help="scrapes for the latency (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=15, help="seconds for memory and CPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the table")
    arguments = parser.parse_args()
    text = report(arguments.scrapes, arguments.seconds)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
