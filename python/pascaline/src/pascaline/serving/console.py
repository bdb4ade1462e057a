"""The log of an instance for people and the journal: stages with durations, the engine's output, the addresses."""

from __future__ import annotations

import json
import logging
import os
import shlex
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from pascaline.engines.client import reachable
from pascaline.redaction import RedactingFormatter, redact
from pascaline.serving.outlet import Outlet
from pascaline.serving.output import visible
from pascaline.serving.repeats import WINDOW_SECONDS, Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pascaline.engines import Task

# syslog's level numbers, which the journal reads from the start of a line (sd-daemon(3)).
JOURNAL_LEVELS = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}
PLAIN = "\033[0m"
SHOWN_CHARACTERS = 500
"""Most characters of a line in a terminal: SGLang prints its 500 arguments in one line. Files and the journal get all.
"""
REPEATED_CHARACTERS = 200
"""Most characters of a repeated line in the note that counts it."""


class Stream(Protocol):
    """The stream that a console writes to."""

    def write(self, text: str, /) -> int:
        """Write a text."""

    def flush(self) -> None:
        """Write all buffered text."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""

    def fileno(self) -> int:
        """Return its file descriptor."""


class Console:
    """Writes lines. In a terminal, a running stage is one line that is updated in place.

    Never raises: a line that cannot be written is lost. A line that repeats too often is counted instead.
    """

    def __init__(self, stream: Stream, clock: Callable[[], float] = monotonic) -> None:
        """clock: monotonic, in seconds."""
        self.on_repeated: Callable[[int], None] = lambda _: None
        """Called with the number of lines that were not written because they repeat others."""
        self._stream = stream
        self._clock = clock
        self._repeats: Repeats[tuple[str, str, str, int]] = Repeats()
        self._terminal = self._stream.isatty()
        self._journal = _writes_to_journal(self._terminal)
        self._stage: str | None = None
        self._stage_start = 0.0
        self._detail = ""

    def line(self, level: str, source: str, text: str) -> None:
        """Write one line with level and source in front. Control characters are written as escapes."""
        self.settle()
        text = visible(redact(text))  # before the line is cut: redact does not find a part of a secret
        # Not the whole line: five hundred long ones are remembered.
        if self._repeats.admits((level, source, text[:REPEATED_CHARACTERS], hash(text)), self._clock()):
            self._write_line(level, source, text)
        else:
            self.on_repeated(1)

    def settle(self) -> None:
        """Write how often lines were repeated, once their window is over. Call this regularly."""
        for (_, source, text, _), times in self._repeats.settled(self._clock()):
            line = f"repeated {times} more times within {WINDOW_SECONDS:g} s: {text}"
            self._write_line("WARNING", source, line)

    def _write_line(self, level: str, source: str, text: str) -> None:
        self._clear()
        if self._terminal and len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
        self._write(_format(level, source, text, journal=self._journal, colours=self._terminal))
        self._show_stage()
        self._flush()

    @property
    def running_stage(self) -> tuple[str, float, str] | None:
        """Name, seconds so far and progress of the stage that runs now; None: none does."""
        return (self._stage, monotonic() - self._stage_start, self._detail) if self._stage else None

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage while it runs, and its duration when it ends."""
        stage = Stage(self, name)
        self._stage, self._stage_start, self._detail = name, monotonic(), ""
        if self._terminal:
            self._show_stage()
            self._flush()
        else:
            self.line("INFO", "pascaline", f"{name} …")
        try:
            yield stage
        except BaseException:
            self._clear()
            self._stage = None
            raise
        stage.seconds = monotonic() - self._stage_start
        self._clear()
        self._stage = None
        level, words = ("ERROR", "failed after") if stage.failed else ("INFO", "done in")
        self.line(level, "pascaline", f"{name} {words} {stage.seconds:.1f} s{stage.note}")

    def tick(self, detail: str | None = None) -> None:
        """Update the running stage's line. detail: current position; None keeps the previous one."""
        if detail is not None:
            self._detail = detail
        if self._terminal and self._stage:
            self._clear()
            self._show_stage()
            self._flush()

    def ready(self, task: Task, agent: tuple[str, int], seconds: float) -> None:
        """Write the addresses of API and agent, and a command to try. seconds: time until ready."""
        host, port = reachable(task.address)
        agent_host, agent_port = reachable(agent)
        self._clear()
        self._write(
            f"\n{visible(task.model.served_name)} is ready after {seconds:.1f} s\n"
            f"  API    http://{_bracketed(host)}:{port}/v1\n"
            f"  agent  http://{_bracketed(agent_host)}:{agent_port}  (/, /health, /metrics, /plan, /openapi.json)\n"
            f"  try    {try_command(task)}\n\n"
        )
        self._flush()

    def _write(self, text: str) -> None:
        # The reader is gone, as with `| head` or a closed terminal: serving continues.
        with suppress(OSError):
            self._stream.write(redact(text))

    def _flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def _show_stage(self) -> None:
        if self._terminal and self._stage:
            seconds = monotonic() - self._stage_start
            self._write(f"… {self._stage} {seconds:.0f} s {self._detail}"[: _width(self._stream) - 1])

    def _clear(self) -> None:
        if self._terminal and self._stage:
            self._write("\r\033[K")


class Stage:
    """A running stage."""

    def __init__(self, console: Console, name: str) -> None:
        """Create a stage of a console; use Console.stage."""
        self.name = name
        self.seconds = 0.0
        self.failed = False
        self.note = ""
        """Text after the duration."""
        self._console = console

    def progress(self, done: int, total: int) -> None:
        """Show a bar."""
        share = done / total if total else 1.0
        bar = ("█" * round(20 * share)).ljust(20, "·")
        self._console.tick(f"{bar} {share:4.0%}")


def try_command(task: Task) -> str:
    """Return a curl command that works: a chat question, or a text completion if the model has no chat template."""
    asked: dict[str, Any]
    if task.model.has_chat_template:
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    else:
        path, asked = "completions", {"prompt": "The capital of France is"}
    question = {"model": task.model.served_name, **asked, "max_tokens": 32, "temperature": 0}
    host, port = reachable(task.address)
    command = ["curl", "-s", f"http://{_bracketed(host)}:{port}/v1/{path}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(question)]
    line = shlex.join(command)
    if task.settings.api_key_file is not None:
        # In double quotes, so that the shell reads the file.
        line += f' -H "Authorization: Bearer $(cat {shlex.quote(str(task.settings.api_key_file))})"'
    return line


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _width(stream: Stream) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 80


def _format(level: str, source: str, text: str, *, journal: bool, colours: bool) -> str:
    if journal:
        return f"<{JOURNAL_LEVELS.get(level, 6)}>{source}: {text}\n"
    colour = COLOURS.get(level, "") if colours else ""
    return f"{colour}{level:<7} {source}: {text}{PLAIN if colour else ''}\n"


def _writes_to_journal(terminal: bool) -> bool:
    return "JOURNAL_STREAM" in os.environ and not terminal


def open_outlet(descriptor: int) -> Outlet:
    """Return a stream to this descriptor that never blocks, and that reports dropped lines in the console's format."""
    terminal = os.isatty(descriptor)

    def note(lines: int) -> str:
        text = f"{lines} lines were not written here: nobody read them in time, or the file could not be written"
        return _format("WARNING", "pascaline", text, journal=_writes_to_journal(terminal), colours=terminal)

    return Outlet(descriptor, note)


class _ConsoleHandler(logging.Handler):
    """Passes the log records of libraries to a console, line by line."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(RedactingFormatter())
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, with its traceback."""
        try:
            for line in self.format(record).splitlines():
                self._console.line(record.levelname, record.name, line)
        except Exception:
            self._console.line("ERROR", record.name, f"a record could not be formatted: {record.msg!r}")


def silence_libraries(console: Console) -> None:
    """Send the logs of libraries to our console, from level WARNING on."""
    logging.basicConfig(level=logging.WARNING, handlers=[_ConsoleHandler(console)])
