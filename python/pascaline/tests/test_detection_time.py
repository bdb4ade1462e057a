"""The time from the last answer to `unresponsive`, with the default settings: the real watching, in simulated time.

The event loop does not wait: its clock jumps to the next timer. So is the worst case searched: the fault at any moment
of the supervisor's rhythm, and an engine that answers the supervisor's questions as late as it may.
"""

from __future__ import annotations

import asyncio
import io
import itertools
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
    """Streams tokens to somebody until `broken`, and answers the supervisor `latency()` seconds after a question."""

    simulated: SimulatedTime
    latency: Callable[[], float]
    broken: float
    counts_on: bool
    """Whether its counters can still be read after that."""
    busy: bool
    """Whether somebody asks; else only the supervisor's test generations do."""
    exit_code: int | None = None
    pid: int = 1
    last_answer: float = 0.0
    """Time at which the last test generation was answered."""
    vitals: Vitals = field(default_factory=Vitals)

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


def seconds_to_detect(engine: Engine) -> float:
    """Watch the engine until it is called unresponsive; return the seconds since its last answer."""
    supervisor = Supervisor(load({}, environment={}), Console(io.StringIO()), Notifier(None, None))
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
    assert supervisor.health.state is State.UNRESPONSIVE
    return engine.simulated.now - (engine.broken if engine.busy else max(engine.last_answer, 1000.0))


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
