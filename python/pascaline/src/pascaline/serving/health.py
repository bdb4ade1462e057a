"""Health of an instance as a pure state machine: events and times in, state and reason out, no I/O.

    planned → starting → ready ⇄ busy → unresponsive → restarting → starting
                            any → draining → stopped          any → gpu-lost, failed

An engine is judged by progress, never by latency: while its counters move, or a test generation succeeds, it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.engines import Progress


class State(StrEnum):
    """What an instance is doing."""

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    UNRESPONSIVE = "unresponsive"
    RESTARTING = "restarting"
    DRAINING = "draining"
    GPU_LOST = "gpu-lost"
    FAILED = "failed"
    STOPPED = "stopped"


ANSWERING = frozenset({State.READY, State.BUSY})
"""States in which requests are welcome."""

_ALWAYS = frozenset({State.DRAINING, State.STOPPED, State.FAILED, State.GPU_LOST})
_NEXT: dict[State, frozenset[State]] = {
    State.PLANNED: _ALWAYS | {State.STARTING},
    State.STARTING: _ALWAYS | {State.READY, State.RESTARTING},
    State.READY: _ALWAYS | {State.BUSY, State.UNRESPONSIVE, State.RESTARTING},
    State.BUSY: _ALWAYS | {State.READY, State.UNRESPONSIVE, State.RESTARTING},
    State.UNRESPONSIVE: _ALWAYS | {State.RESTARTING},
    State.RESTARTING: _ALWAYS | {State.STARTING},
    State.GPU_LOST: _ALWAYS | {State.STARTING},
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.FAILED: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Health:
    """One state, since when it holds, and why it was entered."""

    state: State
    since: float
    """Unix time."""
    reason: str

    def to(self, state: State, now: float, reason: str) -> Health:
        """Return the health after a change; the same where the state is. ValueError where there is no such way."""
        if state is self.state:
            return self
        if state not in _NEXT[self.state]:
            raise ValueError(f"no way from {self.state} to {state}")
        return Health(state, now, reason)


@dataclass(slots=True)
class Judge:
    """Decides from counters and test generations whether a running engine is ready, busy or unresponsive.

    stall_timeout: seconds without any sign of life after which it is unresponsive. Times are of one monotonic clock.
    """

    stall_timeout: float
    last_sign: float
    """When the engine last showed that work moves."""
    progress: Progress | None = None

    def observe(self, now: float, progress: Progress | None) -> None:
        """Take in the counters; None where they could not be read, which is no sign of life."""
        if progress is None:
            return
        if self.progress is None or progress.tokens != self.progress.tokens:
            self.last_sign = now
        self.progress = progress

    def probed(self, now: float) -> None:
        """Take in that a test generation succeeded."""
        self.last_sign = now

    def missed(self, seconds: float) -> None:
        """Take in that nobody looked for so long: silence that nobody listened to is no evidence."""
        self.last_sign += seconds

    def wants_probe(self, now: float, interval: float) -> bool:
        """Whether the engine has shown no sign of life for an interval, so that a test generation is due."""
        return now - self.last_sign >= interval

    def verdict(self, now: float) -> tuple[State, str]:
        """Return the state that the evidence speaks for, and the evidence."""
        silence = now - self.last_sign
        if silence > self.stall_timeout:
            work = f" while {self._requests()} requests wait" if self._requests() else ""
            return State.UNRESPONSIVE, f"no token for {silence:.0f} s{work}"
        if self._requests():
            return State.BUSY, "requests are running"
        return State.READY, "a generation succeeded"

    def _requests(self) -> int:
        return 0 if self.progress is None else self.progress.running + self.progress.queued


def backoff_seconds(restarts: int, base: float, cap: float) -> float:
    """Return the wait before the n-th restart in a row: base, twice that, and so on, at most cap."""
    return float(min(cap, base * 2.0 ** min(restarts - 1, 30))) if restarts > 0 else 0.0
