"""`pascaline exporter`: GPU metrics for Prometheus."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import ConfigurationError, ExitCode, StorageError
from pascaline.gpu.exporter import DEFAULT_INTERVAL, DEFAULT_MAX_AGE, DEFAULT_PORT, Exporter
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment
from pascaline.gpu.reader import Reader
from pascaline.gpu.render import render, to_json
from pascaline.serving.outlet import Outlet

if TYPE_CHECKING:
    from collections.abc import Iterator

STANDARD_ERROR = 2
DESCRIPTION = """Serve metrics of this host's NVIDIA GPUs to Prometheus.

A separate process calls NVML, and is killed when the driver hangs; the metrics then report that
and never repeat old values. docs/metrics.md lists every metric.

  pascaline exporter                      serve http://127.0.0.1:9836/metrics
  pascaline exporter --once               print one page and end
  pascaline exporter --once --json        the same as JSON
  pascaline exporter --demo               two simulated Tesla P4; needs a C compiler, no GPU
  pascaline exporter --record card.nvml   write the answers of this host's NVML; replay them with --demo card.nvml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        help="port to listen on; 0 means any free port (default: %(default)s)",
    )
    parser.add_argument(
        "--interval", type=_seconds, default=DEFAULT_INTERVAL, help="seconds between readings (default: %(default)s)"
    )
    parser.add_argument(
        "--max-age",
        type=_seconds,
        help=f"seconds for which a reading is shown (default: {DEFAULT_MAX_AGE:g}, or two intervals if that is longer)",
    )
    parser.add_argument(
        "--deadline",
        type=_seconds,
        default=5.0,
        help="seconds after which a reading counts as hung (default: %(default)s)",
    )
    parser.add_argument(
        "--demo",
        nargs="?",
        type=Path,
        const=DEMO_SCENARIO,
        metavar="SCENARIO",
        help="read a simulated NVML: the given scenario file, or two Tesla P4 without one",
    )
    parser.add_argument("--once", action="store_true", help="print one reading and end; 1 if NVML did not answer")
    parser.add_argument("--json", action="store_true", help="with --once: JSON instead of Prometheus text")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write a reading as a scenario file and end")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, or print or record one reading."""
    if arguments.max_age is None:
        arguments.max_age = max(DEFAULT_MAX_AGE, 2 * arguments.interval)
    _check(arguments)
    environment = None if arguments.demo is None else fake_nvml_environment(arguments.demo.resolve())
    reader = Reader(deadline=arguments.deadline, environment=environment)
    if arguments.record:
        return _record(reader, arguments.record)
    if arguments.once:
        return _print_once(reader, as_json=arguments.json)
    outlet = Outlet(STANDARD_ERROR, _note_lost)

    def log(line: str) -> None:
        outlet.write(f"pascaline exporter: {line}\n")

    exporter = Exporter(
        reader,
        host=arguments.host,
        port=arguments.port,
        interval=arguments.interval,
        max_age=arguments.max_age,
        log=log,
    )
    log(f"listening on {exporter.url}")
    try:
        with _stopped_by_signals(exporter):
            exporter.run()
    finally:
        outlet.close()
    return ExitCode.OK


def _check(arguments: argparse.Namespace) -> None:
    if arguments.json and not arguments.once:
        raise ConfigurationError("--json needs --once: a server answers Prometheus text only")
    if arguments.max_age <= arguments.interval:
        raise ConfigurationError(
            f"--max-age must be more than --interval ({arguments.interval:g}), got {arguments.max_age:g}: "
            "else there are times without any reading to show"
        )
    if arguments.demo is not None and not arguments.demo.is_file():
        raise ConfigurationError(
            f"--demo: no scenario file {str(arguments.demo)!r}; without a name two Tesla P4 are simulated"
        )


def _print_once(reader: Reader, *, as_json: bool) -> int:
    with reader:
        reading = reader.read()
    print(json.dumps(to_json(reading), indent=2) if as_json else render(reading), end="\n" if as_json else "")
    if not reading.succeeded:
        print(f"pascaline exporter: {reading.status}: {reading.message}", file=sys.stderr)
    return ExitCode.OK if reading.succeeded else ExitCode.FAILED


def _record(reader: Reader, path: Path) -> int:
    from pascaline.gpu.capture import to_scenario

    with reader:
        reading = reader.read()
    if not reading.succeeded:
        print(f"pascaline exporter: nothing to record: {reading.status}: {reading.message}", file=sys.stderr)
        return ExitCode.FAILED
    try:
        path.write_text(to_scenario(reading))
    except OSError as error:
        raise StorageError(f"failed to write {str(path)!r}: {error.strerror}") from error
    print(f"recorded {len(reading.devices)} GPU(s) to {path}; replay with: pascaline exporter --demo {path}")
    return ExitCode.OK


@contextlib.contextmanager
def _stopped_by_signals(exporter: Exporter) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: exporter.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note_lost(lines: int) -> str:
    return f"pascaline exporter: {lines} lines were not written here: nobody read them in time\n"


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"port must be between 0 and 65535, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
