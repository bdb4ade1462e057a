"""A server in a process group of its own, for the benchmarks that start one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, environment: dict[str, str], patience: float
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends. Its group is killed if it does not end in time (seconds)."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
