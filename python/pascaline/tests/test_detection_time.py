"""The time from the last answer to `unresponsive`, with the default settings: the real watching, in simulated time.

The event loop does not wait: its clock jumps to the next timer. So is the worst case searched: the fault at any moment
of the supervisor's rhythm, and an engine that answers the supervisor's questions as late as it may.
"""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import os
import random
import selectors
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import pytest
from pascaline.configuration import load
from pascaline.engines import Progress, Vitals
from pascaline.serving.console import Console
from pascaline.serving.engine_api import POLL_TIMEOUT_SECONDS, Probe
from pascaline.serving.health import DETECTED_WITHIN_SECONDS, State
from pascaline.serving.notify import Notifier
from pascaline.serving.supervisor import POLL_SECONDS, Supervisor
from pascaline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.engines import Task
    from pascaline.serving.engine_api import EngineApi
    from pascaline.serving.process import EngineProcess


class SimulatedTime(selectors.SelectSelector):
    """Instead of waiting for a timer, lets the clock jump to it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is left to wait for"
        self.now += max(timeout, 0.0)
        return super().select(0)


@dataclass
class Engine:
    """Streams tokens to a client until `broken`, and answers the supervisor after `latency()` seconds."""

    simulated: SimulatedTime
    latency: Callable[[], float]
    broken: float
    counts_on: bool
    """Whether its counters can still be read after that."""
    busy: bool
    """Whether clients send requests; otherwise only the supervisor's test generations arrive."""
    exit_code: int | None = None
    pid: int = 1
    last_answer: float = 0.0
    """Time at which the last test generation was answered."""
    vitals: Vitals = field(default_factory=Vitals)
    supervisor: Supervisor = field(
        default_factory=lambda: Supervisor(load({}, environment={}), Console(io.StringIO()), Notifier(None, None))
    )

    async def progress(self, _: object) -> Progress | None:
        asked = self.simulated.now
        if asked >= self.broken and not self.counts_on:
            await asyncio.sleep(POLL_TIMEOUT_SECONDS)
            return None
        answered = min(self.simulated.now, self.broken) if self.busy else 0.0
        await asyncio.sleep(min(self.latency(), POLL_TIMEOUT_SECONDS))
        return Progress(int(answered * 100), int(self.busy), 0, answered * 100, prompts=1, idle_seconds=0.0)

    async def generate(self, _: object, timeout: float) -> Probe:
        asked, seconds = self.simulated.now, self.latency()
        works = asked + seconds < self.broken
        await asyncio.sleep(seconds if works else timeout)
        if works:
            self.last_answer = self.simulated.now
        return Probe(0.0, works, seconds, None)

    async def kill(self) -> None: ...

    async def wait(self) -> None: ...

    async def ended(self) -> None:
        if self.exit_code is None:
            await asyncio.Event().wait()


def seconds_to_detect(engine: Engine) -> float:
    """Watch the engine until it is called unresponsive; return the seconds since its last answer."""
    supervisor = watch(engine)
    assert supervisor.health.state is State.UNRESPONSIVE
    return engine.simulated.now - (engine.broken if engine.busy else max(engine.last_answer, 1000.0))


def watch(engine: Engine) -> Supervisor:
    """Watch the engine until it is called unresponsive, or its process has ended; return the supervisor."""
    supervisor = engine.supervisor
    for state in (State.STARTING, State.READY):
        supervisor.health = supervisor.health.to(state, 0.0, "")
    for name, replacement in (
        ("_progress", engine.progress),
        ("_generate", engine.generate),
        ("_sample_memory", _none),
    ):
        setattr(supervisor, name, replacement)
    supervisor._engine = cast("Any", _NoLimits())
    loop = asyncio.SelectorEventLoop(engine.simulated)
    loop.time = lambda: engine.simulated.now  # type: ignore[method-assign]
    try:
        watching = supervisor._watch(cast("Task", None), cast("EngineProcess", engine), cast("EngineApi", engine))
        loop.run_until_complete(asyncio.wait_for(watching, 1000.0))
    finally:
        loop.close()
    return supervisor


async def _none(_: float) -> None: ...


class _NoLimits:
    def work_limits(self, _: object) -> None:
        return None


LATENCIES: dict[str, Callable[[random.Random], Callable[[], float]]] = {
    "at once": lambda _: lambda: 0.003,
    "just in time": lambda _: lambda: POLL_TIMEOUT_SECONDS - 0.001,
    "at any time": lambda rng: lambda: rng.uniform(0.0, POLL_TIMEOUT_SECONDS - 0.001),
    "now late, now at once": lambda rng: lambda: rng.choice([0.0, 0.9, 1.1, POLL_TIMEOUT_SECONDS - 0.001]),
}


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize(("counts_on", "busy"), list(itertools.product([False, True], repeat=2)))
def test_the_worst_case(monkeypatch: pytest.MonkeyPatch, latency: str, counts_on: bool, busy: bool) -> None:
    """Detected in time, and never sooner than stall_timeout after the last answer that could be seen."""
    rng = random.Random(latency)
    worst, least = 0.0, 1000.0
    for step in range(20):
        simulated = SimulatedTime()
        monkeypatch.setattr(time, "monotonic", lambda simulated=simulated: simulated.now)
        engine = Engine(simulated, LATENCIES[latency](rng), 1030.0 + 0.973 * step, counts_on, busy)
        seconds = seconds_to_detect(engine)
        worst, least = max(worst, seconds), min(least, seconds)
    assert worst <= DETECTED_WITHIN_SECONDS, worst
    unseen = POLL_TIMEOUT_SECONDS + 2 * POLL_SECONDS
    assert least >= Settings().stall_timeout - unseen, least


LACK = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@dataclass
class Unseen(Engine):
    """No request reaches it until `seen_from`, for lack of descriptors; its process ends at `ends`."""

    seen_from: float = 0.0
    ends: float = 0.0
    states: list[tuple[float, State]] = field(default_factory=list)
    """When the supervisor asked, and the state at that moment."""

    async def progress(self, api: object) -> Progress | None:
        self.states.append((self.simulated.now, self.supervisor.health.state))
        if self.simulated.now >= self.ends:
            self.exit_code = 1
        if self.simulated.now < self.seen_from:
            self.supervisor._note_own_failure(LACK, self.simulated.now)
            return None
        return await super().progress(api)

    async def generate(self, api: object, timeout: float) -> Probe:
        if self.simulated.now < self.seen_from:
            return Probe(0.0, ok=False, seconds=0.0, reason=str(LACK), error=LACK)
        return await super().generate(api, timeout)


@pytest.mark.parametrize("busy", [False, True])
def test_one_that_cannot_be_seen_is_not_ready_and_not_killed(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """No descriptors for hours; then it is seen again; at last its process ends, which needs no descriptor."""
    simulated = SimulatedTime()
    monkeypatch.setattr(time, "monotonic", lambda: simulated.now)
    engine = Unseen(simulated, lambda: 0.003, 1e6, True, busy, seen_from=1700.0, ends=1800.0)
    supervisor = watch(engine)
    assert simulated.now < 1802.0
    assert [change.state for change in supervisor.changes][-2:] == [State.BLIND, State.BUSY if busy else State.READY]
    assert supervisor.changes[-2].reason.endswith("lacks something: [Errno 24] Too many open files")
    blind = [at for at, state in engine.states if state is State.BLIND]
    stall = Settings().stall_timeout
    assert stall <= blind[0] - 1000.0 <= stall + 3 * POLL_SECONDS
    assert 1700.0 <= blind[-1] <= 1700.0 + Settings().probe_interval + 3 * POLL_SECONDS


def test_a_process_that_ends_while_it_cannot_be_seen_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedTime()
    monkeypatch.setattr(time, "monotonic", lambda: simulated.now)
    supervisor = watch(Unseen(simulated, lambda: 0.003, 1e6, True, False, seen_from=1e6, ends=1300.0))
    assert (supervisor.health.state, simulated.now < 1302.0) == (State.BLIND, True)
