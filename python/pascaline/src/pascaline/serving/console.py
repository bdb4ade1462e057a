"""What a person or the journal sees of an instance: stages with their durations, the engine's output, the addresses."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from pascaline.engines.client import reachable
from pascaline.redaction import RedactingFormatter, redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.engines import Task

# syslog's numbers, which the journal reads from the start of a line (sd-daemon(3)).
JOURNAL_LEVELS = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}
PLAIN = "\033[0m"
SHOWN_CHARACTERS = 500
"""Of a line in a terminal: SGLang prints its 500 arguments in one. Files and the journal get it whole."""


class Console:
    """Writes lines to standard error; a running stage is one line that is renewed where that is a terminal.

    Never fails: a line that cannot be written is lost.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """stream: None = standard error."""
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._journal = "JOURNAL_STREAM" in os.environ and not self._terminal
        self._stage: str | None = None
        self._stage_start = 0.0
        self._detail = ""

    def line(self, level: str, source: str, text: str) -> None:
        """Write one line: level and source in front, as every log here."""
        self._clear()
        text = redact(text)  # before it is cut: a part of a secret is not found
        if self._terminal and len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
        if self._journal:
            self._write(f"<{JOURNAL_LEVELS.get(level, 6)}>{source}: {text}\n")
        else:
            colour = COLOURS.get(level, "") if self._terminal else ""
            self._write(f"{colour}{level:<7} {source}: {text}{PLAIN if colour else ''}\n")
        self._show_stage()
        self._flush()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a stage while it runs, and how long it took at its end."""
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
        """Renew the running stage's line; detail: what it is at, None = as before."""
        if detail is not None:
            self._detail = detail
        if self._terminal and self._stage:
            self._clear()
            self._show_stage()
            self._flush()

    def ready(self, task: Task, agent: tuple[str, int], seconds: float) -> None:
        """Say where everything is, and a command that works."""
        host, port = reachable(task.address)
        agent_host, agent_port = reachable(agent)
        self._clear()
        self._write(
            f"\n{task.model.served_name} is ready after {seconds:.1f} s\n"
            f"  API    http://{_bracketed(host)}:{port}/v1\n"
            f"  agent  http://{_bracketed(agent_host)}:{agent_port}  (/health, /metrics, /plan, /docs)\n"
            f"  try    {try_command(task)}\n\n"
        )
        self._flush()

    def _write(self, text: str) -> None:
        # The reader of our lines went away, as with `| head` or a terminal that was closed: serving goes on.
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
        """Belongs to a console; use Console.stage."""
        self.name = name
        self.seconds = 0.0
        self.failed = False
        self.note = ""
        """Shown behind the duration."""
        self._console = console

    def progress(self, done: int, total: int) -> None:
        """Show a bar."""
        share = done / total if total else 1.0
        bar = ("█" * round(20 * share)).ljust(20, "·")
        self._console.tick(f"{bar} {share:4.0%}")


def try_command(task: Task) -> str:
    """Return a curl line that asks the model a question."""
    question = {
        "model": task.model.served_name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 32,
        "temperature": 0,
    }
    host, port = reachable(task.address)
    command = ["curl", "-s", f"http://{_bracketed(host)}:{port}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(question)]
    line = shlex.join(command)
    if task.settings.api_key_file is not None:
        # Double quotes: the shell is to read the file.
        line += f' -H "Authorization: Bearer $(cat {shlex.quote(str(task.settings.api_key_file))})"'
    return line


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 80


def silence_libraries() -> None:
    """Libraries report to our handler, and only what matters."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
