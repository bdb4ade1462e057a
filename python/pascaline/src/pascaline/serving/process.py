"""The engine's process: starts it, passes its output on line by line, and ends it with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.inherited import inherited
from pascaline.redaction import LineRedactor
from pascaline.serving import strays
from pascaline.serving.output import Output, Throttle, visible

if TYPE_CHECKING:
    from pascaline.engines import Launch

KILL_SECONDS = 10.0
"""From SIGKILL to the end of a process on a loaded machine. If it takes longer, the process is stuck in the kernel, for
example in a driver call that does not return."""
STRAY_SECONDS = 1.0
"""The same for what left its group: shorter, as the main loop waits meanwhile."""
KEPT_LINES = 200
"""Number of last output lines that are kept to explain a failure."""
KEPT_CHARACTERS = 2000
"""Most characters of each line: the explanation becomes the reason in `/health` and `systemctl status`."""
OnLine = Callable[[str], None]
OnDropped = Callable[[int], None]


class EngineProcess:
    """One run of an engine."""

    def __init__(
        self, process: asyncio.subprocess.Process, output: Output, on_line: OnLine, on_dropped: OnDropped, mark: str
    ) -> None:
        """Take over a started process; use `start`. mark: of its environment."""
        self.pid = self.stuck_pid = process.pid
        self._mark = mark
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = process
        self._output = output
        self._on_line = on_line
        self._on_dropped = on_dropped
        self._reader = asyncio.create_task(self._pass_output_on())

    @classmethod
    async def start(
        cls,
        launch: Launch,
        on_line: OnLine,
        on_dropped: OnDropped = lambda _: None,
        cpus: frozenset[int] = frozenset(),
    ) -> EngineProcess:
        """Start the command as the leader of a new session and group; it dies with this process.

        on_line: called with each line of output to show. on_dropped: called with the number of lines that were dropped
        because the engine wrote too many. cpus: those that it may use; empty: all. Raises OSError if the machine has no
        process, memory or descriptor left.
        """
        read_end, write_end = os.pipe()
        output, mark = await Output.open(read_end), strays.new_mark()
        try:
            process = await asyncio.create_subprocess_exec(
                *with_parent(*launch.command, cpus=cpus),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env=inherited() | launch.environment | {strays.VARIABLE: mark},
                start_new_session=True,
            )
        except BaseException:
            output.close()
            raise
        finally:
            os.close(write_end)
        return cls(process, output, on_line, on_dropped, mark)

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs; negative if a signal ended it."""
        return self._process.returncode

    async def ended(self) -> None:
        """Wait until it ends; its last output may not be read yet."""
        await self._process.wait()

    async def wait(self) -> int:
        """Wait until it ends and its last output is read; return the exit code."""
        code = await self._process.wait()
        # A grandchild that outlives it may keep the pipe open.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reader), timeout=1.0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM to it alone: it ends its children itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    async def kill(self) -> int | None:
        """Kill it and all that it started, also what left its group; return its exit code.

        None if not even SIGKILL ends one of them, which is then `stuck_pid`.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), KILL_SECONDS)
        left = strays.end(self._mark, STRAY_SECONDS)
        self.stuck_pid = left[0].pid if left else self.pid
        self._output.close()
        return None if left else self.exit_code

    async def _pass_output_on(self) -> None:
        redact, throttle = LineRedactor(), Throttle()
        async for line in self._output.lines():
            text = visible(redact(line.text))
            if not line.is_note:
                self.last_lines.append(text[:KEPT_CHARACTERS])
            self._tell_of(throttle.dropped())
            if throttle.admits(line.size):
                self._on_line(text)
        self._tell_of(throttle.dropped(at_end=True))

    def _tell_of(self, dropped: int) -> None:
        if dropped:
            self._on_dropped(dropped)
            self._on_line(f"WARNING: {dropped} lines of output in one second were not shown")
