"""Runs another program to its end, within a time limit, and returns what it printed; names how a program ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

KILL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Output:
    """What a program printed."""

    code: int
    """Exit code; -1 if it did not end in time."""
    text: str
    """Standard output."""
    errors: str = ""
    """Standard error."""


def run_program(command: Sequence[str], text: str = "", *, timeout: float) -> Output | None:
    """Run a program with `text` as its standard input. Return None if it cannot be started. timeout: seconds.

    A program that is stuck in the driver cannot be killed: it is left behind, and this process continues.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return None
    try:
        out, errors = process.communicate(text, timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILL_SECONDS)
        return Output(-1, "", f"did not end within {timeout:g} s")
    return Output(process.returncode, out, errors)


def ending(code: int) -> str:
    """Return how a program ended, for a message. code: as subprocess reports it; negative: ended by that signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"  # most real-time signals have no name
