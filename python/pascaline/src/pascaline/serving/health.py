"""The health of an instance as a pure state machine: events and times in, state and reason out, no I/O.

| from | to | when |
|---|---|---|
| planned | starting | the model is found, verified and planned, and the engine's process is started |
| starting | ready | the first test generation succeeded |
| starting | restarting | the engine ended, or was not ready within start_timeout (if it was never ready: failed) |
| ready | busy | the engine reports that requests run or wait |
| busy | ready | it reports that none do |
| ready, busy | blind | for stall_timeout no answer could be seen, for lack of something on our side (below) |
| blind | ready | an answer is seen again |
| blind | busy | an answer is seen again, and requests run or wait |
| ready, busy, blind | unresponsive | no answer for over stall_timeout, and no excuse (below); the engine is killed |
| ready, busy, blind | restarting | the engine's process ended |
| unresponsive | restarting | the engine's process has ended |
| restarting, gpu-lost | starting | the wait is over and the engine is started again |
| any but the last three | gpu-lost | evidence or the engine's output shows it, or its process cannot be killed |
| any but the last three | draining | a signal or POST /drain |
| any but stopped | failed | an error that a restart does not fix, or more than max_restarts in a row |
| any | stopped | the engine has ended |

The last three are draining, failed and stopped: nothing leads back from them. If the state does not change, its time
and reason stay the same.

**An engine is judged by answers, never by latency.** Signs of life are tokens that are sent to clients, and test
generations that succeed (the tokens of a test generation do not count by themselves). Computed work is not a sign of
life. It only excuses silence, as in a long prefill. Each step of work excuses one stall_timeout, as long as:

- no more was computed than a healthy engine computes between two answers (WorkLimits);
- there was work besides the test generations;
- the test generations do not fail with an error.

If an engine counts only its work, that work is taken as its answers.

**An engine whose answers stop is unresponsive at most DETECTED_WITHIN_SECONDS after the last one**, with the default
stall_timeout of 45 s (after the last work that excuses its silence, if there is any). The parts, at their worst:

- 7 s: the last answer is seen late. It was sent just after the engine made a page of counters; that page comes after
  5 s (POLL_TIMEOUT_SECONDS), is taken up within 1 s, and 1 s later the next is asked for, which shows the answer.
- 45 s: stall_timeout.
- 2 s: the verdict. A look begins 1 s after the last one (POLL_SECONDS), and waits 1 s at most for a page.

While the page of counters fails, answers to clients are not seen when they leave. If they stop during that time, what
passes until the page is back comes on top, at most one stall_timeout.

Seconds in which the supervisor's own process stands still are not counted (`awake_clock`), nor those in which its
requests fail for lack of something on its side, such as descriptors or memory. **An engine that cannot be seen is not
ready either**: after stall_timeout of such seconds since the last sign of life or excuse the state is blind, and
nothing is killed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.engines import Progress, WorkLimits


class State(StrEnum):
    """What an instance is doing."""

    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    BLIND = "blind"
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
    State.READY: _ALWAYS | {State.BUSY, State.BLIND, State.UNRESPONSIVE, State.RESTARTING},
    State.BUSY: _ALWAYS | {State.READY, State.BLIND, State.UNRESPONSIVE, State.RESTARTING},
    State.BLIND: _ALWAYS | {State.READY, State.BUSY, State.UNRESPONSIVE, State.RESTARTING},
    State.UNRESPONSIVE: _ALWAYS | {State.RESTARTING},
    State.RESTARTING: _ALWAYS | {State.STARTING},
    State.GPU_LOST: _ALWAYS | {State.STARTING},
    State.DRAINING: frozenset({State.STOPPED, State.FAILED}),
    State.FAILED: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Health:
    """A state, the time since which it holds, and the reason."""

    state: State
    since: float
    """Unix time."""
    reason: str

    def to(self, state: State, now: float, reason: str) -> Health:
        """Return the health after a change; unchanged if already in that state.

        Raises ValueError if the transition is not allowed.
        """
        if state is self.state:
            return self
        if state not in _NEXT[self.state]:
            raise ValueError(f"no way from {self.state} to {state}")
        return Health(state, now, reason)


DETECTED_WITHIN_SECONDS = 55.0
"""See above; tests/test_detection_time.py searches the worst case."""
PROBE_TOKENS = 8.0
"""The most that one test generation adds to the counters of an engine's work: its prompt and its token, which may both
be counted only when it ends."""
PROBE_ANSWERS = 2.0
"""The most that one test generation adds to the counters of answers: its token, and the token of a finished answer."""
FAILED_PROBES = 3
"""Consecutive test generations with an error after which work no longer excuses silence."""


@dataclass(slots=True)
class Judge:
    """Decides from counters and test generations whether a running engine is ready, busy, blind or unresponsive.

    stall_timeout: seconds without a sign of life after which it is unresponsive. All times are seconds of one monotonic
    clock.
    """

    stall_timeout: float
    last_sign: float
    """Time of the last sign of life."""
    progress: Progress | None = None
    limits: WorkLimits | None = None
    """None: the engine counts only its work, which is taken as its answers."""
    last_excuse: float = -math.inf
    """Time at which the engine last computed something that excuses its silence."""
    failed_probes: int = 0
    """Consecutive test generations that ended with an error."""
    _since: Progress | None = field(default=None, init=False)
    """The counters at the last sign."""
    _looked: float = field(default=-math.inf, init=False)
    _probes: int = field(default=0, init=False)
    """Test generations that were sent since the last sign, including the one that still runs."""
    _probing: bool = field(default=False, init=False)
    _short_steps: int = field(default=0, init=False)
    """Observations since the last sign with a prefill step of less than half a chunk: each is the end of a prompt."""
    _missed: float = field(default=0.0, init=False)
    """Seconds since the last sign or excuse in which nothing could be observed."""
    _lack: str = field(default="", init=False)

    def observe(self, now: float, progress: Progress | None) -> None:
        """Record the counters; None if they could not be read, which is not a sign of life."""
        if progress is None:
            return
        before, looked = self.progress, self._looked
        self.progress, self._looked = progress, now
        if before is None or self._since is None:
            self._since = before or progress
            before = self._since
        # Counters of a running engine never fall. If one does anyway, it counts again once it exceeds its old value.
        if _answered(before=self._since, after=progress) > self._probes * _share_of_probe(progress):
            self._sign(now)
        elif self._is_excused(before, progress, now - looked):
            self.last_excuse = now
            self._missed = 0.0

    def probe_sent(self) -> None:
        """Record that a test generation was sent: counters that it moves are not a sign of life."""
        self._probing = True
        self._probes += 1

    def probed(self, now: float) -> None:
        """Record that a test generation succeeded."""
        self._probing = False
        self.failed_probes = 0
        self._sign(now)

    def probe_not_sent(self) -> None:
        """Record that a test generation did not reach the engine, for lack of something on our side."""
        self._probing = False
        self._probes = max(0, self._probes - 1)

    def probe_failed(self, *, with_error: bool) -> None:
        """Record that a test generation failed. with_error: the engine answered, and not because it is busy."""
        self._probing = False
        self.failed_probes = self.failed_probes + 1 if with_error else 0

    def missed(self, seconds: float, lack: str) -> None:
        """Record that nothing could be observed for this many seconds: they do not count as silence.

        lack: what this process or host lacks.
        """
        self._missed += seconds
        self._lack = lack
        self.last_sign += seconds
        self.last_excuse += seconds

    def wants_probe(self, now: float, interval: float) -> bool:
        """Whether a test generation is due: no sign of life for `interval` seconds."""
        return now - self.last_sign >= interval

    def verdict(self, now: float) -> tuple[State, str]:
        """Return the state according to the evidence, and the evidence in words."""
        silence = now - self.last_sign
        excused = now - self.last_excuse <= self.stall_timeout and self.failed_probes < FAILED_PROBES
        if silence > self.stall_timeout and not excused:
            return State.UNRESPONSIVE, self._complaint(silence)
        if self._missed > self.stall_timeout:
            text = f"the engine could not be asked for {self._missed:.0f} s, because this process or host lacks"
            return State.BLIND, f"{text} something: {self._lack}"
        if self._requests():
            return State.BUSY, "requests are running"
        return State.READY, "a generation succeeded"

    def _sign(self, now: float) -> None:
        self.last_sign = max(self.last_sign, now)
        self._since = self.progress
        self._probes = int(self._probing)
        self._short_steps = 0
        self._missed = 0.0

    def _is_excused(self, before: Progress, progress: Progress, seconds: float) -> bool:
        """Whether the work since the previous observation, `seconds` ago, can still lead to an answer."""
        limits, since = self.limits, self._since or before
        if limits is None or math.isinf(seconds):
            return False
        step = progress.prefill - before.prefill
        self._short_steps += 0 < step < limits.chunk / 2
        prefill, decode = progress.prefill - since.prefill, progress.decode - since.decode
        prompts = self._short_steps if progress.prompts is None else progress.prompts - (since.prompts or 0.0)
        works = step > 0 or progress.decode > before.decode
        is_the_probes = prefill <= self._probes * PROBE_TOKENS and decode <= self._probes
        within = prefill <= limits.prefill and prompts <= limits.prompts and decode <= limits.decode
        return works and within and not is_the_probes and not _was_idle(before, progress, seconds)

    def _complaint(self, silence: float) -> str:
        work = f" while {self._requests()} requests wait" if self._requests() else ""
        computed = self._computed()
        lost = f"; {computed:.0f} tokens were computed and reached nobody" if computed else ""
        errors = f"; {self.failed_probes} test generations in a row failed" if self.failed_probes > 1 else ""
        return f"no token for {silence:.0f} s{work}{lost}{errors}"

    def _computed(self) -> float:
        """Return the tokens computed since the last sign of life; 0 if the test generations explain them."""
        if self.limits is None or self.progress is None or self._since is None:
            return 0.0
        computed = self.progress.prefill + self.progress.decode - self._since.prefill - self._since.decode
        return computed if computed > self._probes * PROBE_TOKENS else 0.0

    def _requests(self) -> int:
        return 0 if self.progress is None else self.progress.running + self.progress.queued


def _answered(*, before: Progress, after: Progress) -> float:
    """Return how much was answered between two observations."""
    if before.answers is None or after.answers is None:
        return after.tokens - before.tokens
    return after.answers - before.answers


def _share_of_probe(progress: Progress) -> float:
    return PROBE_TOKENS if progress.answers is None else PROBE_ANSWERS


def _was_idle(before: Progress, progress: Progress, seconds: float) -> bool:
    """Whether the engine was idle for more than half of the time between two observations, so in no long prefill."""
    if before.idle_seconds is None or progress.idle_seconds is None:
        return False
    return progress.idle_seconds - before.idle_seconds > seconds / 2


def backoff_seconds(restarts: int, base: float, cap: float) -> float:
    """Return the seconds to wait before the n-th consecutive restart: base, twice base, and so on, at most cap."""
    return float(min(cap, base * 2.0 ** min(restarts - 1, 30))) if restarts > 0 else 0.0
