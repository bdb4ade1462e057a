"""Runs `pascaline serve` as a process, talks to its two ports, and finds whatever it left behind.

with running(folder, model=path, faults="hang=1") as instance:
    instance.wait_for_state("ready")
    instance.api("/v1/models")
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
from support.ports import free_port
from support.warm_pascaline import Fork, can_fork, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

FAKE_ENGINE = Path(__file__).parents[1] / "fake_engine/fake_engine.py"
PATIENCE = 60.0
"""Seconds within which what must happen has happened, also on a machine under load."""
QUESTION_SECONDS = 0.5
"""Between two questions to an agent for a state that its log does not show."""
INTERRUPT_SECONDS = 5.0
"""Within which an instance that is interrupted ends, unless it is stopped or hangs."""
DYING_SECONDS = 0.5
"""What the kernel's SIGKILL to the children of a process that ended takes to reach them on a machine under load."""
MARK = "FAKE_ENGINE_MARK"
"""Variable that every process of one instance inherits, so that none can be lost sight of."""


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def http(
    url: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout: float = PATIENCE, method: str = ""
) -> Answer:
    """GET, or POST of a body as JSON; any status is an answer, and OSError means that there was none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url,
        data,
        {"Content-Type": "application/json", **(headers or {})},
        method=method or ("GET" if body is None else "POST"),
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())
    except (HTTPException, urllib.error.URLError) as error:
        raise ConnectionError(repr(error)) from error


def wait_until(what: str, probe: Callable[[], Any], *, seconds: float = PATIENCE, every: float = 0.05) -> Any:
    """Return the first true answer; AssertionError with the last one after the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: last answer {answer!r}"
        time.sleep(every)
    return answer


def entered_state(line: str) -> str:
    """Return the state that a line of an instance's log says it entered; empty for other lines."""
    return line.partition(" → ")[2].partition(":")[0] if " pascaline: " in line else ""


class Instance:
    """A running `pascaline serve`."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str], wrapper: Sequence[str] = ()
    ) -> None:
        """settings: dotted key -> value, passed as flags. wrapper: a command that executes the one behind it."""
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self._sessions: set[int] = set()
        """Of the engines so far."""
        self.lines: list[str] = []
        """Its standard error, line by line."""
        self._last_state = ""
        """By its log."""
        ports = {"port": free_port(), "agent_port": free_port(), "cache_dir": folder / "cache"}
        self.settings = {**ports, **settings}
        self.process, self._stderr = _start(
            ["serve", *flags(self.settings)],
            {**_own_environment(), "CUDA_VISIBLE_DEVICES": "", **environment, MARK: self.mark},
            folder,
            wrapper,
        )
        self._reads = threading.Event()
        self._reads.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._stderr:
            self.lines.append(line.rstrip("\n"))
            if state := entered_state(self.lines[-1]):
                self._last_state = state
            self._reads.wait()

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Let nobody read its log while the block runs."""
        self._reads.clear()
        try:
            yield
        finally:
            self._reads.set()

    # --- HTTP

    @property
    def api_url(self) -> str:
        """Where the engine listens."""
        return f"http://127.0.0.1:{self.settings['port']}"

    def api(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Ask the engine."""
        return http(self.api_url + path, body, **options)

    def agent(self, path: str, body: Any = None, **options: Any) -> Answer:
        """Ask the agent."""
        return http(f"http://127.0.0.1:{self.settings['agent_port']}{path}", body, **options)

    def complete(self, prompt: str = "a b c", max_tokens: int = 4, **options: Any) -> Answer:
        """Let the engine complete a prompt."""
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return self.api("/v1/completions", body, **options)

    def fault(self, **values: Any) -> None:
        """Change what the running fake engine does."""
        # One that crashes at once may not get to the answer.
        with contextlib.suppress(OSError):
            assert self.api("/fake/faults", values).status == 200

    def health(self) -> dict[str, Any]:
        """Return the agent's report; empty while it does not answer."""
        with contextlib.suppress(OSError):
            report: dict[str, Any] = self.agent("/health").json
            return report
        return {}

    def metric(self, sample: str) -> float:
        """Return a sample of the agent's page, named with its labels as the page writes them."""
        for line in self.agent("/metrics").text.splitlines():
            if line.rpartition(" ")[0] == sample:
                return float(line.rpartition(" ")[2])
        raise KeyError(sample)

    # --- waiting

    def wait_for_state(self, *states: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Return the report once one of the states holds.

        The log is watched, and the agent is asked when a state is there, and now and then, as a log can lose lines: to
        answer takes milliseconds of a core, for which instances and tests wait.
        """
        next_question = 0.0

        def reached() -> dict[str, Any] | None:
            nonlocal next_question
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            if self._last_state not in states and time.monotonic() < next_question:
                return None
            next_question = time.monotonic() + QUESTION_SECONDS
            report = self.health()
            return report if report.get("state") in states else None

        try:
            report: dict[str, Any] = wait_until(f"state {states}", reached, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.health()}\n{self.text}") from None
        return report

    def wait_for_line(self, part: str, seconds: float = PATIENCE) -> str:
        """Return the first line of output that holds a text."""

        def found() -> str | None:
            return next((line for line in list(self.lines) if part in line), None)

        try:
            line: str = wait_until(f"a line with {part!r}", found, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        return line

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; return the exit code."""
        code = self.process.wait(seconds)
        # A process that was left behind holds the pipe open.
        self._reader.join(5)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = PATIENCE) -> int:
        """Send a signal and wait for the end; return the exit code."""
        self.process.send_signal(number)
        return self.wait(seconds)

    # --- what it says and leaves

    @property
    def text(self) -> str:
        """All output so far."""
        return "\n".join(self.lines)

    @property
    def states(self) -> list[str]:
        """Every state that was entered so far, in order."""
        return [state for line in list(self.lines) if (state := entered_state(line))]

    @property
    def error(self) -> str:
        """The error that it ended with, without the program's name."""
        return self.text.rpartition("pascaline serve: ")[2]

    def descendants(self) -> list[psutil.Process]:
        """Return every living process of this instance but itself, wherever its parent went.

        By the mark, and by the session that a marked one leads or is in: a process that sets its title overwrites its
        variables, as SGLang's do.
        """
        living = list(_living_processes())
        marked = [process for process in living if _marked(process, self.mark)]
        self._sessions |= {session for process in marked if (session := _session(process)) is not None}
        return [
            process
            for process in living
            if process.pid != self.process.pid and (process in marked or _session(process) in self._sessions)
        ]

    def command_lines(self) -> list[str]:
        """Of `descendants`, without those that ended meanwhile."""
        lines = []
        for process in self.descendants():
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return lines

    def _interrupt(self) -> None:
        """End it at once as a person does, by two signals: one that is killed leaves its folder to the next one."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(INTERRUPT_SECONDS)

    def end(self) -> list[str]:
        """End all that is left; return the command lines of what should not have been there any more."""
        self._reads.set()
        self._interrupt()
        if self.process.poll() is None:
            self.process.kill()
            self.wait()
            # The kernel ends the engine, and the engine's workers after it.
            with contextlib.suppress(AssertionError):
                wait_until("end of the engine", lambda: not self.descendants(), seconds=5)
        left, found = [], self.descendants()
        if found:
            time.sleep(DYING_SECONDS)
            found = self.descendants()
        for process in found:
            with contextlib.suppress(psutil.Error):
                left.append(" ".join(process.cmdline()))
                process.kill()
        # Nobody holds the other end any more, so the reader comes to the end sooner or later.
        self._reader.join(PATIENCE)
        self._stderr.close()
        return left


def _own_environment() -> dict[str, str]:
    """Return this process's variables; pytest changes one of them in the main thread, and instances start in others."""
    return {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}


def _start(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, wrapper: Sequence[str]
) -> tuple[subprocess.Popen[bytes] | Fork, IO[str]]:
    """Run `pascaline`; return the process and its standard error. With a wrapper it is a process of its own."""
    read, write = os.pipe()
    try:
        if not wrapper and can_fork(environment):
            process: subprocess.Popen[bytes] | Fork = start(
                arguments, environment=environment, folder=folder, stderr=write
            )
        else:
            command = [*wrapper, sys.executable, "-m", "pascaline", *arguments]
            null = subprocess.DEVNULL
            process = subprocess.Popen(command, stdin=null, stdout=null, stderr=write, env=environment, cwd=folder)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    return process, os.fdopen(read)


def _living_processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def _session(process: psutil.Process) -> int | None:
    """Return the session of an engine's process; None for one that shares that of the tests."""
    try:
        session = os.getsid(process.pid)
    except OSError:
        return None
    return session if session != os.getsid(0) else None


def flags(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags of settings: dotted key -> value; booleans as switches, lists as repeated flags."""
    for key, value in settings.items():
        flag = "--" + key.replace(".", "-").replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else "--no-" + flag[2:]
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                yield f"{flag}={each}"


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    faults: str = "",
    environment: Mapping[str, str] | None = None,
    wrapper: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Instance]:
    """Run an instance while the block runs, and see to it that nothing of it is left.

    settings: as keyword arguments, with `__` for the dot of a key. faults: of the fake engine. wrapper: as `Instance`.
    """
    keys = {key.replace("__", "."): value for key, value in settings.items() if value is not None}
    instance = Instance(folder, keys, {"FAKE_ENGINE_FAULTS": faults, **(environment or {})}, wrapper)
    try:
        yield instance
    except BaseException:
        instance.end()
        raise
    left = instance.end()
    assert left == [], f"left behind: {left}\n{instance.text}"
