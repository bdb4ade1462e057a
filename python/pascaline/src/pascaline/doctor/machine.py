"""Access to a machine: files below a root, programs, services and GPUs, and a record of every answer.

The collector reads only through this. A recorded machine (a folder of files and outputs) answers in the same way, so
broken hosts can be reproduced from their reports.
"""

from __future__ import annotations

import mmap
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.gpu.reader import Reader
from pascaline.programs import Output, run_program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.gpu.reading import Reading

READ_BYTES = 4 * 2**20
"""Most bytes of one file or answer that are kept."""
COMMAND_SECONDS = 20.0
FETCH_SECONDS = 3.0
SPEED_BYTES = 256 * 2**20
"""Bytes of a model file that are read to measure the disk."""
SPEED_SECONDS = 3.0
_BLOCK_BYTES = 4 * 2**20


@dataclass
class Machine:
    """This machine, with its files below `root`."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    transcript: list[tuple[str, str]] = field(default_factory=list)
    """(question, answer) pairs for the report."""

    @property
    def now(self) -> float:
        """Unix time in seconds."""
        return time.time()

    def path(self, absolute: str | Path) -> Path:
        """Return the path at which this process finds a file of the machine."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str | Path) -> str | None:
        """Return the text of a file; None if it is missing or may not be read."""
        try:
            with self.path(absolute).open("rb") as file:
                text = file.read(READ_BYTES).decode(errors="replace")
        except OSError as error:
            self.transcript.append((f"file {absolute}", f"({error.strerror})"))
            return None
        self.transcript.append((f"file {absolute}", text))
        return text

    def list(self, absolute: str | Path) -> list[str]:
        """Return the names in a folder, sorted; empty if there is no such folder."""
        try:
            return sorted(entry.name for entry in self.path(absolute).iterdir())
        except OSError:
            return []

    def run(
        self, name: str, command: Sequence[str], *, text: str = "", timeout: float = COMMAND_SECONDS
    ) -> Output | None:
        """Run a program and return its output; None if there is no such program. `name` is its name in the record.

        A program that waits in the driver cannot be killed; it is left behind, and this process continues.
        """
        output = run_program(command, text, timeout=timeout)
        shown = "(no such program)" if output is None else f"(exit code {output.code})\n{output.text}{output.errors}"
        self.transcript.append((f"{name}: {' '.join(command)}", shown))
        return output

    def fetch(self, url: str) -> str | None:
        """Return the body of an HTTP answer; None after FETCH_SECONDS without one, or if its status is an error."""
        body = _fetch(url)
        self.transcript.append((f"url {url}", "(no answer)" if body is None else body))
        return body

    def reading(self) -> Reading:
        """Read NVML in a process that may be killed."""
        with Reader(environment=self.environment) as reader:
            reading = reader.read()
        self.transcript.append(("nvml", repr(reading)))
        return reading

    def read_speed(self, path: Path) -> float | None:
        """Return bytes per second of reading a file past the page cache; None if it cannot be measured."""
        return _read_speed(path)


def _fetch(url: str) -> str | None:
    # Never through a proxy from the environment: agents and engines are not behind it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=FETCH_SECONDS) as answer:
            return str(answer.read(READ_BYTES).decode(errors="replace"))
    except (OSError, ValueError, urllib.error.URLError):
        return None


def _read_speed(path: Path) -> float | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _BLOCK_BYTES) as block:  # O_DIRECT needs aligned memory; a mapping is aligned to pages
            began, done = time.perf_counter(), 0
            while done < SPEED_BYTES and time.perf_counter() - began < SPEED_SECONDS:
                count = os.preadv(descriptor, [block], done)
                done += count
                if count < _BLOCK_BYTES:
                    break
            seconds = time.perf_counter() - began
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # A small file shows the disk's latency, not its speed.
    return done / seconds if done >= _BLOCK_BYTES and seconds > 0 else None
