"""A clock that stands still while this process does, so that its own pauses do not look like silence of the engine.

A process stands still while a signal or a debugger stops it, while its machine is suspended or paused by a hypervisor,
and while it gets no processor.
"""

from __future__ import annotations

import time

LATE_TICKS = 2.0
"""Longest time between two readings that counts in full, in ticks; even on a busy machine a reading is seldom later."""


class AwakeClock:
    """Must be read at least once a tick; if a reading is much later, the process stood still and only a tick counts.

    Since each reading counts, no number of pauses keeps the clock from going on.
    """

    def __init__(self, tick: float) -> None:
        """tick: longest normal time between two readings, in seconds."""
        self._tick = tick
        self._read = time.monotonic()
        self._slept = 0.0

    def time(self) -> float:
        """Return the seconds of the monotonic clock, without those in which this process stood still."""
        now = time.monotonic()
        if now - self._read > LATE_TICKS * self._tick:
            self._slept += now - self._read - self._tick
        self._read = now
        return now - self._slept
