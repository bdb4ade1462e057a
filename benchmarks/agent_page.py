"""What ten open pages cost the agent: its latency for others, and its memory.

    ./dev exec python benchmarks/agent_page.py [--pages 10] [--requests 2000] > docs/results/agent-page.md

One instance on the fake engine of the tests. Requests for /readyz follow each other on one connection, first without
pages, then with all pages open; each page reads a snapshot a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import psutil  # noqa: E402
from support.instance import FAKE_ENGINE, Instance, running  # noqa: E402
from support.models import tiny, write_gguf  # noqa: E402

LIMIT_MS, LIMIT_MIB = 5.0, 60.0
SETTLE_SECONDS = 10.0


def main() -> None:
    """Measure, and print a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
        with running(folder, model=model, engine_executable=FAKE_ENGINE, device="cpu") as instance:
            instance.wait_for_state("ready")
            rows = [measure("no page", instance, arguments.requests)]
            pages = [open_page(instance) for _ in range(arguments.pages)]
            time.sleep(SETTLE_SECONDS)
            rows.append(measure(f"{arguments.pages} pages", instance, arguments.requests))
            for page in pages:
                if page.sock is not None:
                    page.sock.shutdown(socket.SHUT_RDWR)
                page.close()
    print(__doc__.split("\n")[0])
    print(f"\n{os.cpu_count()} cores, load {load:.1f} before. Wanted: p99 below {LIMIT_MS:g} ms, memory below "
          f"{LIMIT_MIB:g} MiB.\n")  # fmt: skip
    print("| | median, ms | p99, ms | CPU, ms a second | memory, MiB |\n|---|---|---|---|---|")
    print("\n".join(rows))


def open_page(instance: Instance) -> HTTPConnection:
    """Open the stream of a page, which another thread reads."""
    connection = HTTPConnection("127.0.0.1", instance.settings["agent_port"])
    connection.request("GET", "/events")
    answer = connection.getresponse()

    def read() -> None:
        with contextlib.suppress(Exception):
            while answer.readline():
                pass

    threading.Thread(target=read, daemon=True).start()
    return connection


def measure(name: str, instance: Instance, requests: int) -> str:
    """Return a row of the table."""
    process = psutil.Process(instance.process.pid)
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(SETTLE_SECONDS)
    after, lasted = process.cpu_times(), time.monotonic() - began
    busy = 1e3 * (after.user + after.system - before.user - before.system) / lasted
    connection = HTTPConnection("127.0.0.1", instance.settings["agent_port"])
    times = []
    for _ in range(requests):
        start = time.perf_counter()
        connection.request("GET", "/readyz")
        connection.getresponse().read()
        times.append(1e3 * (time.perf_counter() - start))
        time.sleep(0.005)
    connection.close()
    p99 = statistics.quantiles(times, n=100)[98]
    memory = process.memory_info().rss / 2**20
    return f"| {name} | {statistics.median(times):.2f} | {p99:.2f} | {busy:.1f} | {memory:.1f} |"


if __name__ == "__main__":
    main()
