"""The last resort of the supervisor: an unexpected exception."""

from __future__ import annotations

import asyncio
import io
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
from pascaline.configuration import load
from pascaline.engines import Vitals
from pascaline.errors import ExitCode, PascalineError
from pascaline.serving.console import Console
from pascaline.serving.health import Judge, State
from pascaline.serving.notify import Notifier
from pascaline.serving.supervisor import Supervisor, Watch

if TYPE_CHECKING:
    from pascaline.serving.engine_api import EngineApi


class Broken:
    """An engine's API that fails as nothing should."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.vitals = Vitals()

    def progress(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def supervisor(log: io.StringIO) -> Supervisor:
    return Supervisor(load({"stall_timeout": 30.0}, environment={}), Console(log), Notifier(None, None))


def watch_of(api: Broken) -> Watch:
    now = time.monotonic()
    return Watch(cast("EngineApi", api), Judge(30.0, last_sign=now), now)


def mistakes(supervisor: Supervisor) -> float:
    [line] = [line for line in supervisor.metrics.page().decode().splitlines() if line.startswith("pascaline_internal")]
    return float(line.rpartition(" ")[2])


def in_state(supervisor: Supervisor, *states: State) -> None:
    for state in states:
        supervisor.health = supervisor.health.to(state, time.time(), "")


def test_a_look_that_fails_is_told_whole_and_counted_and_the_next_goes_on(
    supervisor: Supervisor, log: io.StringIO
) -> None:
    in_state(supervisor, State.STARTING, State.READY)
    api = Broken(ZeroDivisionError("of ours"))
    watch = watch_of(api)

    async def two_looks() -> None:
        await supervisor._look_safely(watch)
        assert mistakes(supervisor) == 1
        api.error = None
        await supervisor._look_safely(watch)

    asyncio.run(two_looks())
    assert mistakes(supervisor) == 1
    assert supervisor.health.state is State.READY
    assert "ERROR   pascaline: the engine was not judged: Traceback (most recent call last):" in log.getvalue()
    assert "ERROR   pascaline: the engine was not judged: ZeroDivisionError: of ours" in log.getvalue()


def test_looks_that_only_fail_end_the_instance(supervisor: Supervisor) -> None:
    """An engine that cannot be judged is not called ready for ever."""
    in_state(supervisor, State.STARTING, State.READY)
    watch = watch_of(Broken(ZeroDivisionError("of ours")))
    watch.understood -= 31
    with pytest.raises(ZeroDivisionError):
        asyncio.run(supervisor._look_safely(watch))


def test_any_other_mistake_ends_it_in_order(
    supervisor: Supervisor, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare(*_: Any) -> None:
        raise LookupError("of ours")

    monkeypatch.setattr(supervisor, "_prepare", prepare)
    with pytest.raises(PascalineError) as raised:
        asyncio.run(supervisor._live())
    assert str(raised.value) == (
        "an internal error of pascaline (LookupError('of ours')); please report it with the traceback in the log"
    )
    assert raised.value.exit_code is ExitCode.FAILED
    assert supervisor.health.state is State.FAILED
    assert mistakes(supervisor) == 1
    assert "pascaline: an internal error of pascaline: LookupError: of ours" in log.getvalue()
