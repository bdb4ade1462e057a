"""`pascaline top`: GPUs and instances, live in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING

from pascaline.defaults import PORTS
from pascaline.errors import ConfigurationError, ExitCode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine, Iterator

    import httpx
    from rich.console import Console

    from pascaline.top.pages import Target
    from pascaline.top.readings import HostReading

_SECOND_AGENT = PORTS.agent + PORTS.between_instances
DESCRIPTION = f"""Show live data of GPUs and instances: load, planned and used memory, requests, tokens/s, heat, power.

Reads the metrics pages of the exporter ({PORTS.exporter}), the agents ({PORTS.agent}, {_SECOND_AGENT}, …) and the
engines (at the port that their agent reports). Columns: RUN/WAIT requests running and queued; PLAN/USED GPU memory
planned for the instance and used by it. A terminal of 100 columns or more also shows TTFT and ITL (mean time to first
token and between tokens since the previous reading), and what slows a GPU's clocks. q or Ctrl-C ends it.

  pascaline top                                   this host
  pascaline top --host gpu-1 --host gpu-2:30011   all instances of gpu-1, and one of gpu-2
  pascaline top --once                            print one reading; exit code 1 if no host answered
  pascaline top --json                            the same as JSON, sizes in bytes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--host",
        action="append",
        metavar="HOST[:AGENT_PORT]",
        help="host to read, may be given several times (default: 127.0.0.1); with a port, only that agent's instance",
    )
    parser.add_argument(
        "--exporter-port", type=int, default=PORTS.exporter, help="port of the exporters (default: %(default)s)"
    )
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between readings (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=2.0, help="seconds to wait for each page (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print one reading and end; the default if piped")
    parser.add_argument("--json", action="store_true", help="print one reading as JSON and end")


def run(arguments: argparse.Namespace) -> int:
    """Draw until q or Ctrl-C, or print one reading."""
    from pascaline.top.pages import parse_target

    _check(arguments)
    targets = [parse_target(text, arguments.exporter_port) for text in arguments.host or ["127.0.0.1"]]
    if arguments.json or arguments.once or not sys.stdout.isatty():
        return asyncio.run(_print_once(targets, arguments.timeout, as_json=arguments.json))
    asyncio.run(_draw_until_stopped(targets, arguments.timeout, arguments.interval))
    return ExitCode.OK


def _check(arguments: argparse.Namespace) -> None:
    for flag in ("interval", "timeout"):
        value = getattr(arguments, flag)
        if not 0.1 <= value <= 3600:
            raise ConfigurationError(f"--{flag}: must be between 0.1 and 3600 seconds, got {value:g}")
    if not 1 <= arguments.exporter_port <= 65535:
        raise ConfigurationError(f"--exporter-port: must be between 1 and 65535, got {arguments.exporter_port}")


async def _print_once(targets: list[Target], deadline: float, *, as_json: bool) -> int:
    from rich.console import Console

    from pascaline.top.history import History
    from pascaline.top.view import render

    async with _client(deadline) as client:
        readings = await _read(client, targets, deadline, {})
    history = History()
    for reading in readings:
        history.add(reading)
    if as_json:
        print(json.dumps([dataclasses.asdict(reading) for reading in readings], indent=2))
    else:
        console = Console()
        for line in render(readings, history, _clock(), console.width, height=None):
            console.print(line, no_wrap=True, crop=False)
    return ExitCode.FAILED if all(reading.error for reading in readings) else ExitCode.OK


async def _draw_until_stopped(targets: list[Target], deadline: float, interval: float) -> None:
    from rich.console import Console, Group
    from rich.live import Live

    from pascaline.top.history import History
    from pascaline.top.view import render

    stop = asyncio.Event()
    console, history, before = Console(), History(), dict[int, "HostReading"]()
    with _keys(stop), Live(console=console, screen=True, auto_refresh=False) as live:
        async with _client(deadline) as client:
            while not stop.is_set():
                readings = await _unless_stopped(_read(client, targets, deadline, before), stop)
                for number, reading in enumerate(readings):
                    history.add(reading)
                    before[number] = reading
                if readings:
                    live.update(
                        Group(*render(readings, history, f"{_clock()}  q quits", *_size(console))), refresh=True
                    )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), interval)


async def _read(
    client: httpx.AsyncClient, targets: list[Target], deadline: float, before: dict[int, HostReading]
) -> list[HostReading]:
    from pascaline.top.pages import fetch_hosts
    from pascaline.top.readings import read_host

    pages = await fetch_hosts(client, targets, deadline)
    now = time.time()
    return [read_host(page, now, before.get(number)) for number, page in enumerate(pages)]


async def _unless_stopped(reading: Coroutine[None, None, list[HostReading]], stop: asyncio.Event) -> list[HostReading]:
    """Return the readings; an empty list if the user ends the program while a slow host is read."""
    read, stopped = asyncio.ensure_future(reading), asyncio.ensure_future(stop.wait())
    await asyncio.wait({read, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if read.done():
        stopped.cancel()
        return read.result()
    read.cancel()
    return []


@contextlib.contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """Set the event on q, Q, Ctrl-C and SIGTERM. Meanwhile the terminal passes on single keys without an echo."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if not sys.stdin.isatty():
        yield
        return
    saved = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def on_key() -> None:
        # Read all waiting keys from the descriptor: keys in Python's buffer would not wake the loop.
        keys = os.read(sys.stdin.fileno(), 1024)
        if not keys or b"q" in keys.lower():
            stop.set()

    loop.add_reader(sys.stdin, on_key)
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def _client(deadline: float) -> httpx.AsyncClient:
    import httpx

    # No proxy from the environment: a fleet's metrics pages are not behind it. No limit of connections: a page that
    # waits for a free one would count as not answering.
    return httpx.AsyncClient(trust_env=False, timeout=deadline, limits=httpx.Limits())


def _size(console: Console) -> tuple[int, int]:
    return console.width, console.height


def _clock() -> str:
    return time.strftime("%H:%M:%S")
