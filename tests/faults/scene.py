"""Runs one fault against one instance under load, and records what happened: states, times, requests, agent's latency."""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import psutil
from pascaline.errors import ExitCode
from support.instance import FAKE_ENGINE, PATIENCE, Instance, running, wait_until
from support.ledger import Ledger, Load, Outcome, stretch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

STALL_SECONDS = 3.0
PROBE_SECONDS = 0.5
DEFAULT_STALL_SECONDS = 45.0
"""The default of stall_timeout, which a test compares with the setting's."""
IMPATIENT: dict[str, Any] = {
    "engine_executable": FAKE_ENGINE,
    "device": "cpu",
    "probe_interval": PROBE_SECONDS,
    "stall_timeout": STALL_SECONDS,
    "drain_timeout": 10,
}
STALL_DETECT_SECONDS = STALL_SECONDS + 12.0
"""Longest time to detect an engine whose answers stop. With the default of stall_timeout it is 57 s: below 60 s."""
EXIT_DETECT_SECONDS = 5.0
RECOVER_SECONDS = 20.0
LOOK_SECONDS = 0.1
"""Interval at which the agent is asked."""
AGENT_PATIENCE_SECONDS = 5.0
HOLD_SECONDS = 6.0
"""How long a situation without a consequence is watched: twice stall_timeout."""
KEY = "sk-faults-0123456789abcdef"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row of the table: what goes wrong, and all that may follow from it."""

    name: str
    group: str
    inject: Callable[[Scene], None]
    outcome: Literal["recovers", "stays", "ends", "refused"]
    """recovers: readiness goes and comes back. stays: readiness stays. ends: the instance ends by itself (and serves
    again after `heal` when its unit starts it again). refused: the first start ends."""
    states: str = ""
    """Regular expression of the states after the first `ready`, without `busy`, joined by spaces."""
    says: str = ""
    """Regular expression that the log holds."""
    detect: float = EXIT_DETECT_SECONDS
    """Limit, in seconds, from the fault to the loss of readiness."""
    recover: float = RECOVER_SECONDS
    """Limit, in seconds, from detection (or from `heal`) to an answer that is whole."""
    stalls: bool = False
    """Whether it is found by silence, so that stall_timeout is a part of the time to detect."""
    loses: frozenset[Outcome] = frozenset({Outcome.CUT, Outcome.REFUSED})
    """What requests may become besides whole answers."""
    heal: Callable[[Scene], None] | None = None
    """Takes the cause away once it is detected."""
    faults: str = ""
    """Of the fake engine, from its first start on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Scene], None] | None = None
    """Runs before the instance starts; may change the scene's settings, environment and wrapper."""
    code: int = ExitCode.OK
    hold: float = HOLD_SECONDS
    key: bool = False
    """Whether requests need an API key."""
    clients: int = 2
    quick: bool = False
    """Whether it also runs without --all."""
    agent_may_be_silent: bool = False
    needs: Callable[[], str] | None = None
    """Returns why this machine cannot run it; empty if it can."""


@dataclass
class Record:
    """What a row measured. Times in seconds; None: did not happen."""

    fault: Fault
    states: list[str] = field(default_factory=list)
    stall_seconds: float = STALL_SECONDS
    """The setting stall_timeout."""
    detected: float | None = None
    recovered: float | None = None
    ledger: Ledger = field(default_factory=Ledger)
    agent_p99: float | None = None
    problems: list[str] = field(default_factory=list)
    text: str = ""

    @property
    def detected_by_default(self) -> float | None:
        """Time to detect with the default of stall_timeout."""
        if self.detected is None:
            return None
        return self.detected + (DEFAULT_STALL_SECONDS - self.stall_seconds if self.fault.stalls else 0.0)

    @property
    def lost(self) -> int:
        """Requests that were taken and not answered whole."""
        return self.ledger.count(Outcome.CUT) + self.ledger.count(Outcome.SILENT)


class Scene:
    """An instance with its folder and model, as injectors see it."""

    def __init__(self, folder: Path, model: Path, fault: Fault) -> None:
        """model: is copied, so that a fault may damage it."""
        self.folder = folder
        self.model = shutil.copy(model, folder / "model.gguf")
        self.fault = fault
        self.faults = f"decode_tokens_per_second=100 {fault.faults}"
        self.settings: dict[str, Any] = IMPATIENT | {"model": self.model, "stall_timeout": STALL_SECONDS * stretch()}
        self.settings |= dict(fault.settings)
        if "start_timeout" in fault.settings:
            self.settings["start_timeout"] *= stretch()
        self.environment: dict[str, str] = {}
        self.wrapper: Sequence[str] = ()
        self.notes: dict[str, Any] = {}
        """What an injector has to remember until `heal`."""
        self.after = contextlib.ExitStack()
        """Runs at the end of the row."""
        self._instance: Instance | None = None
        if fault.key:
            (folder / "key").write_text(KEY)
            (folder / "key").chmod(0o600)
            self.settings["api_key_file"] = folder / "key"

    @property
    def instance(self) -> Instance:
        """The running instance."""
        assert self._instance is not None
        return self._instance

    @contextlib.contextmanager
    def serving(self) -> Iterator[Instance]:
        """Run an instance; a second one takes the ports of the first."""
        if self._instance is not None:
            self.settings |= {name: self._instance.settings[name] for name in ("port", "agent_port", "cache_dir")}
        with running(
            self.folder, faults=self.faults, environment=self.environment, wrapper=self.wrapper, **self.settings
        ) as self._instance:
            yield self._instance

    @property
    def port(self) -> int:
        """Of the engine's API."""
        return int(self.instance.settings["port"])

    @property
    def agent_port(self) -> int:
        """Of the agent."""
        return int(self.instance.settings["agent_port"])

    def engine(self) -> psutil.Process:
        """The engine's first process."""
        return psutil.Process(self.instance.health()["engine_pid"])

    def worker(self) -> psutil.Process:
        """The process that plays the scheduler."""
        return next(each for each in self.engine().children() if "--worker" in each.cmdline())

    def tell(self, **values: Any) -> None:
        """Change what the running fake engine does."""
        self.instance.fault(**values)

    def signal(self, name: str) -> None:
        """Send a signal to the supervisor."""
        self.instance.process.send_signal(signal.Signals[name])


class Watcher:
    """Asks the agent for readiness all the time, and notes changes and latencies."""

    def __init__(self, port: int) -> None:
        """port: the agent's."""
        self.changes: list[tuple[float, bool | None]] = []
        """(time, readiness); None: no answer within AGENT_PATIENCE_SECONDS, or no connection."""
        self.seconds: list[float] = []
        self._port = port
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def first(self, since: float, *readiness: bool | None) -> float | None:
        """Return the first time after `since` at which the readiness was one of these."""
        return next((when for when, ready in list(self.changes) if when >= since and ready in readiness), None)

    def p99(self) -> float | None:
        """Return the 99th percentile of the agent's latency."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99)] if self.seconds else None

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            began = time.monotonic()
            ready = self._ask()
            if ready is not None:
                self.seconds.append(time.monotonic() - began)
            self.changes.append((time.monotonic(), ready))

    def _ask(self) -> bool | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=AGENT_PATIENCE_SECONDS)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def run(fault: Fault, folder: Path, model: Path) -> Record:
    """Run one row; what went otherwise than the table says is in `Record.problems`."""
    record = Record(fault)
    scene = Scene(folder, model, fault)
    record.stall_seconds = scene.settings["stall_timeout"]
    try:
        with scene.after:
            if fault.prepare is not None:
                fault.prepare(scene)
            (_refused if fault.outcome == "refused" else _served)(scene, record)
    except Exception as error:
        record.problems.append(f"{type(error).__name__}: {error}")
    return record


def _refused(scene: Scene, record: Record) -> None:
    began = time.monotonic()
    with scene.serving() as instance:
        scene.fault.inject(scene)
        code = instance.wait(PATIENCE * stretch())
        record.detected = time.monotonic() - began
    _judge_end(record, instance, code)
    if scene.fault.heal is not None:
        scene.fault.heal(scene)
        healed = time.monotonic()
        with scene.serving() as instance:
            instance.wait_for_state("ready", seconds=PATIENCE * stretch())
            record.recovered = time.monotonic() - healed
            _end(record, instance, ExitCode.OK)


def _served(scene: Scene, record: Record) -> None:
    fault = scene.fault
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(scene.serving())
        instance.wait_for_state("ready", "busy", seconds=PATIENCE * stretch())
        watcher = stack.enter_context(Watcher(scene.agent_port))
        load = Load(scene.port, clients=fault.clients, key=KEY if fault.key else None)
        record.ledger = load.ledger
        with load:
            # Each client has been answered, so that the fault meets a load.
            wait_until("a load", lambda: len(load.ledger.entries) >= fault.clients, seconds=PATIENCE * stretch())
            began = time.monotonic()
            fault.inject(scene)
            _follow(scene, record, watcher, began, stack)
        record.agent_p99 = watcher.p99()
        if scene.instance.process.poll() is None:
            _end(record, scene.instance, ExitCode.OK)
        record.text += scene.instance.text
    _judge(record, began)


def _follow(scene: Scene, record: Record, watcher: Watcher, began: float, stack: contextlib.ExitStack) -> None:
    """Wait for what the row expects."""
    fault, instance = scene.fault, scene.instance
    if fault.outcome == "stays":
        time.sleep(fault.hold * stretch())
        lost = watcher.first(began, *((False,) if fault.agent_may_be_silent else (False, None)))
        if lost is not None:
            record.problems.append(f"readiness was lost after {lost - began:.1f} s")
        asked = time.monotonic()
        wait_until("an answer of the agent", lambda: watcher.first(asked, True), seconds=PATIENCE * stretch())
        record.states = instance.states
        return
    limit = fault.detect + PATIENCE * stretch()
    record.detected = wait_until("detection", lambda: watcher.first(began, False, None), seconds=limit) - began
    if fault.outcome == "ends":
        code = instance.wait(PATIENCE * stretch())
        _judge_end(record, instance, code)
        record.states = instance.states
    if fault.heal is not None:
        fault.heal(scene)
    healed = time.monotonic() if fault.heal is not None else began + record.detected
    if fault.outcome == "ends" and fault.heal is None:
        return
    if fault.outcome == "ends":
        stack.enter_context(scene.serving()).wait_for_state("ready", seconds=PATIENCE * stretch())
    ledger = record.ledger
    limit = fault.recover + PATIENCE * stretch()
    entry = wait_until(f"recovery ({ledger})", lambda: ledger.whole_since(healed), seconds=limit)
    # The log is read a moment after the agent answers.
    serving = scene.instance
    wait_until("ready in the log", lambda: serving.states[-1:] in (["ready"], ["busy"]), seconds=PATIENCE * stretch())
    record.recovered = entry.ended - healed
    record.states = record.states or instance.states


def _end(record: Record, instance: Instance, code: ExitCode) -> None:
    errors = instance.metric("pascaline_internal_errors_total") if instance.health() else 0
    if errors:
        record.problems.append(f"{errors:g} internal errors")
    ended = instance.stop(seconds=PATIENCE * stretch())
    if ended != code:
        record.problems.append(f"SIGTERM ended it with {ended}, must be {code}")


def _judge_end(record: Record, instance: Instance, code: int) -> None:
    fault = record.fault
    record.text += instance.text
    if code != fault.code:
        record.problems.append(f"it ended with {code}, must be {int(fault.code)}: {instance.error[-300:]}")
    if "Traceback" in instance.error:
        record.problems.append(f"a traceback: {instance.error[-300:]}")
    if fault.outcome == "refused" and not re.search(fault.says, instance.error):
        record.problems.append(f"it says {instance.error[-300:]!r}, must match {fault.says!r}")


def _judge(record: Record, began: float) -> None:
    """Compare a row that served with the table."""
    fault, ledger, problems = record.fault, record.ledger, record.problems
    states = " ".join(state for state in record.states if state != "busy")
    states = re.sub(r"\bready( ready)+\b", "ready", states)
    if not re.fullmatch(f"starting ready ?{fault.states}", states):
        problems.append(f"states {states!r}, must be {'starting ready ' + fault.states!r}")
    if fault.says and not re.search(fault.says, record.text):
        problems.append(f"the log has no {fault.says!r}: {_tail(record.text)}")
    for what, seconds, limit in (
        ("detected", record.detected, fault.detect),
        ("recovered", record.recovered, fault.recover),
    ):
        if seconds is not None and seconds > limit * stretch():
            problems.append(f"{what} after {seconds:.1f} s, must be {limit:g} s at most")
    if not ledger.is_balanced:
        problems.append(f"the ledger is not balanced: {ledger.sent} sent, {ledger}")
    # An instance that ends owes an answer to what it had accepted; a connection may meet the end of its listener.
    owed = [each for each in ledger.entries if fault.outcome != "ends" or each.began < began]
    for outcome in set(Outcome) - {Outcome.WHOLE} - fault.loses:
        if any(each.outcome is outcome for each in owed):
            problems.append(f"requests were {outcome}: {ledger}")
    if re.search(r" pascaline: .*Traceback", record.text):
        problems.append("a traceback of pascaline's own")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def table(records: Sequence[Record]) -> str:
    """Return the table of some rows, as Markdown."""
    head = (
        "| fault | outcome | states after ready | detected, s | by default, s | recovered, s | whole | refused | cut |"
    )
    head += " silent | agent's p99, ms |"
    lines = [head, "|" + "---|" * 11]
    for record in records:
        states = " ".join(record.states).removeprefix("starting ready").replace("busy", "").split()
        counts = " | ".join(str(record.ledger.count(outcome)) for outcome in Outcome)
        lines.append(
            f"| {record.fault.name} | {record.fault.outcome} | {' '.join(states) or '-'} | {_shown(record.detected)} | "
            f"{_shown(record.detected_by_default)} | {_shown(record.recovered)} | {counts} | "
            f"{_shown(record.agent_p99, 1000)} |"
        )
    return "\n".join(lines)


def _shown(seconds: float | None, factor: float = 1.0) -> str:
    return "-" if seconds is None else f"{seconds * factor:.1f}"
