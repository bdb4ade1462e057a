"""The engine's process: started in a group of its own, its output passed on line by line, ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from pascaline.child import with_parent

if TYPE_CHECKING:
    from pascaline.engines import Launch

NOT_INHERITED = frozenset({"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"})
"""The service manager's variables: what an engine tells it would count as ours."""
KEPT_LINES = 200
"""Last lines of output that explain a failure."""
MAX_LINE_BYTES = 64 * 1024
LINES_PER_SECOND = 500
"""More than an engine says in earnest; what exceeds it is counted, not shown, so that a flood costs nothing."""

OnLine = Callable[[str], None]


class EngineProcess:
    """One run of an engine."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        """Take over a started process; use `start`."""
        self.pid = process.pid
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = process
        self._on_line = on_line
        self._reader = asyncio.create_task(self._pass_output_on())

    @classmethod
    async def start(cls, launch: Launch, on_line: OnLine) -> EngineProcess:
        """Start the command; it leads a new session and group, and dies with this process."""
        process = await asyncio.create_subprocess_exec(
            *with_parent(*launch.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | launch.environment,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        return cls(process, on_line)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for its end and its last output; return the exit code."""
        code = await self._process.wait()
        # A grandchild that outlives it may hold the pipe open.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reader), timeout=1.0)
        return code

    def terminate(self) -> None:
        """Ask it to end; its children are its own affair."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    async def kill(self) -> int:
        """End it and everything in its group at once; return its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return await self.wait()

    async def _pass_output_on(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        window, shown, dropped = monotonic(), 0, 0
        while line := await _read_line(stream):
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            if monotonic() - window >= 1.0:
                if dropped:
                    self._on_line(f"WARNING: {dropped} lines of output in one second were not shown")
                window, shown, dropped = monotonic(), 0, 0
            if shown < LINES_PER_SECOND:
                shown += 1
                self._on_line(text)
            else:
                dropped += 1


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """Return the next line, or a piece of one that is longer than the limit; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await stream.readexactly(max(error.consumed, 1))
