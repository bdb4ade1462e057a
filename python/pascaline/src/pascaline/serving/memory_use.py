"""How much memory the engine's processes hold, and whether it has grown since the engine was ready: a leak.

Counts the pages that belong to a process alone (RssAnon of proc_pid_status(5)); mapped files can be dropped at any
time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pascaline.units import format_bytes

PROC = Path("/proc")
SAMPLE_SECONDS = 5.0
"""Interval between two samples."""
LEAK_SHARE, LEAK_BYTES = 0.25, 64 * 2**20
"""Growth beyond both of these, a share of the first sample and bytes, is named if the engine ends for lack of memory. A
healthy engine allocates its weights and KV cache before it is ready."""


@dataclass(slots=True)
class MemoryUse:
    """The first and the last sample of one run of an engine. Times are seconds of the monotonic clock."""

    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None

    def is_due(self, now: float) -> bool:
        """Whether SAMPLE_SECONDS have passed since the last sample."""
        return self.last is None or now - self.last[0] >= SAMPLE_SECONDS

    def sampled(self, now: float, n_bytes: int) -> None:
        """Record a sample. Ignore 0 bytes: they mean that the process has ended."""
        if n_bytes:
            self.last = (now, n_bytes)
            self.first = self.first or self.last

    @property
    def leak(self) -> str | None:
        """The growth in words; None if there was none worth naming."""
        if self.first is None or self.last is None:
            return None
        (began, before), (ended, after) = self.first, self.last
        if after - before < max(LEAK_BYTES, LEAK_SHARE * before):
            return None
        hours = max(ended - began, 1.0) / 3600
        rate = format_bytes(int((after - before) / hours))
        return (
            f"its memory grew from {format_bytes(before)} when it was ready to {format_bytes(after)} ({rate} an hour)"
        )


def resident_bytes(leader: int, proc: Path = PROC) -> int:
    """Return the anonymous memory of all processes in the session that this process leads; 0 if none is left."""
    total = 0
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ValueError, LookupError):
                # pid (name) state ppid pgrp session: the name may hold spaces and brackets.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    total += _anonymous_bytes(folder)
    return total


def _anonymous_bytes(folder: Path) -> int:
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
