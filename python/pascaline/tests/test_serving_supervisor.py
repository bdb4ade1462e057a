"""The last resort of the supervisor: an unexpected exception; and what this process lacks is not the engine's fault."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
from pascaline.configuration import load
from pascaline.engines import Vitals
from pascaline.errors import EngineError, ExitCode, PascalineError, StorageError
from pascaline.gpu.loss import NOTHING_KNOWN
from pascaline.serving.console import Console
from pascaline.serving.engine_api import EngineApi, Probe
from pascaline.serving.health import Judge, State
from pascaline.serving.notify import Notifier
from pascaline.serving.supervisor import Lack, Patience, Supervisor, Watch

if TYPE_CHECKING:
    from pascaline.serving.process import EngineProcess


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


def test_a_lack_of_memory_is_held_neither_against_the_engine_nor_against_us(supervisor: Supervisor) -> None:
    """Raised in the look itself: no mistake, no end after stall_timeout, and the time does not count."""
    in_state(supervisor, State.STARTING, State.READY)
    watch = watch_of(Broken(None))
    watch.understood -= 31
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "_read_counters", fails_with(MemoryError()))
        asyncio.run(supervisor._look_safely(watch))
    assert mistakes(supervisor) == 0
    assert supervisor._taken_lack() == Lack("Cannot allocate memory", watch.looked)


class TestLack:
    """Seconds of a watch that began at 100 and has looked at 110."""

    @pytest.mark.parametrize(
        ("since", "excused", "seconds"),
        [
            (111.0, 100.0, 10.0),  # a request that failed at once: all since the look before
            (105.0, 100.0, 15.0),  # a thread that did not begin: since it should have
            (105.0, 108.0, 12.0),  # and none twice
            (111.0, 115.0, 5.0),
        ],
    )
    def test_what_does_not_count(self, since: float, excused: float, seconds: float) -> None:
        judge = Judge(30.0, last_sign=100.0)
        watch = Watch(cast("EngineApi", Broken(None)), judge, 100.0)
        watch.looked, watch.excused = 110.0, excused
        watch.look(120.0, lack=Lack("memory", since))
        assert judge.last_sign == 100.0 + seconds
        assert (watch.looked, watch.excused) == (120.0, 120.0)


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


def test_what_the_host_lacks_at_the_first_start_is_no_internal_error(
    supervisor: Supervisor, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare(*_: Any) -> None:
        raise OSError(errno.EAGAIN, "failed to start a thread: can't start new thread")

    monkeypatch.setattr(supervisor, "_prepare", prepare)
    with pytest.raises(EngineError, match=r"^this host lacks what a start needs: .*can't start new thread"):
        asyncio.run(supervisor._live())
    assert supervisor.health.state is State.FAILED
    assert mistakes(supervisor) == 0
    assert "Traceback" not in log.getvalue()


def test_without_a_folder_for_temporary_files_it_says_what_to_set(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(StorageError, match=r"No usable temporary directory .*; set TMPDIR to a folder"):
        supervisor._private_folder()


class Unasked:
    """An engine's API that a process without descriptors asks."""

    vitals = Vitals()
    asked = 0

    def __init__(self, well_after: float = 1e9) -> None:
        self.well_after = well_after

    def _ask(self) -> None:
        self.asked += 1
        if self.asked <= self.well_after:
            raise LACK

    def is_loaded(self) -> bool:
        self._ask()
        return True

    def generate(self, _: float) -> Probe:
        return Probe(time.time(), ok=False, seconds=0.0, reason=str(LACK), error=LACK)


LACK = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class TestWhatThisProcessLacks:
    def test_the_gpus_are_unknown_where_nobody_can_look(
        self, supervisor: Supervisor, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "_in_thread", fails_with(LACK))
        assert asyncio.run(supervisor._evidence((), 0.0)) is NOTHING_KNOWN
        assert "failed to look at the GPUs: [Errno 24]" in log.getvalue()

    def test_a_test_generation_that_was_not_sent_is_none(self, supervisor: Supervisor) -> None:
        probe = asyncio.run(supervisor._generate(cast("EngineApi", Unasked()), 1.0))
        assert probe.lack is LACK
        assert supervisor.last_probe is None
        assert "pascaline_probe_failures_total 0.0" in supervisor.metrics.page().decode()

    def test_a_start_waits_as_much_longer(self, supervisor: Supervisor, log: io.StringIO) -> None:
        api = Unasked(well_after=3)
        process = cast("EngineProcess", Process())

        async def load() -> bool:
            patience = Patience(supervisor._clock.time() + 0.2)  # less than one pause
            return await supervisor._poll_until(
                process, patience, lambda: supervisor._is_loaded(cast("EngineApi", api))
            )

        assert asyncio.run(load())
        assert api.asked == 4
        assert "this process or host lacks something: [Errno 24]" in log.getvalue()

    def test_other_errors_leave_a_start_its_time(self, supervisor: Supervisor) -> None:
        async def no() -> bool:
            return False

        async def load() -> bool:
            patience = Patience(supervisor._clock.time() + 0.2)
            return await supervisor._poll_until(cast("EngineProcess", Process()), patience, no)

        assert not asyncio.run(load())

    def test_only_what_we_lack_is_raised_while_it_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        api = EngineApi.__new__(EngineApi)
        for error, raised in ((ConnectionRefusedError(111, "refused"), False), (LACK, True)):
            monkeypatch.setattr(EngineApi, "ask", fails_with(error))
            if raised:
                with pytest.raises(OSError, match="Too many open files"):
                    api.is_loaded()
            else:
                assert not api.is_loaded()


def fails_with(error: Exception) -> Any:
    def ask(*_: Any) -> Any:
        raise error

    return ask


class Process:
    exit_code = None

    async def ended(self) -> None:
        await asyncio.Event().wait()
