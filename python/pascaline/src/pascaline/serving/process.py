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
from pascaline.redaction import LineRedactor

if TYPE_CHECKING:
    from pascaline.engines import Launch

NOT_INHERITED = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"}
)
"""The service manager's variables: what an engine tells it would count as ours. And a secret that no engine needs, as
none downloads anything."""
KILL_SECONDS = 10.0
"""From SIGKILL to the end of a process, on a machine under load; one that takes longer waits in the kernel, as for a
driver that does not return."""
KEPT_LINES = 200
"""Last lines of output that explain a failure."""
MAX_LINE_BYTES = 64 * 1024
LINES_PER_SECOND = 500
"""More than an engine says in earnest; what exceeds it is counted, not shown, so that a flood costs nothing."""

OnLine = Callable[[str], None]


class EngineProcess:
    """One run of an engine."""

    def __init__(self, process: asyncio.subprocess.Process, output: Output, on_line: OnLine) -> None:
        """Take over a started process; use `start`."""
        self.pid = process.pid
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = process
        self._output = output
        self._on_line = on_line
        self._reader = asyncio.create_task(self._pass_output_on())

    @classmethod
    async def start(cls, launch: Launch, on_line: OnLine) -> EngineProcess:
        """Start the command; it leads a new session and group, and dies with this process."""
        read_end, write_end = os.pipe()
        output = await Output.open(read_end)
        try:
            process = await asyncio.create_subprocess_exec(
                *with_parent(*launch.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env={name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
                | launch.environment,
                start_new_session=True,
            )
        except BaseException:
            output.close()
            raise
        finally:
            os.close(write_end)
        return cls(process, output, on_line)

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

    async def kill(self) -> int | None:
        """End it and everything in its group at once; return its exit code, None where not even SIGKILL ends it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), KILL_SECONDS)
        self._output.close()
        return self.exit_code

    async def _pass_output_on(self) -> None:
        redact = LineRedactor()
        window, shown, dropped = monotonic(), 0, 0
        while line := await self._output.read_line():
            text = redact(line.decode(errors="replace").rstrip())
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


class Output:
    """The reading end of a pipe. Not asyncio's own for a child: that one's end is waited for together with the child's,
    and a grandchild that left the group can hold it open for ever."""

    def __init__(self, stream: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        """Use `open`."""
        self._stream = stream
        self._transport = transport

    @classmethod
    async def open(cls, read_end: int) -> Output:
        """Take over a file descriptor."""
        stream = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_end, "rb", buffering=0)
        )
        return cls(stream, transport)

    async def read_line(self) -> bytes:
        """Return the next line, or a piece of one that is longer than the limit; empty at the end."""
        try:
            return await self._stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            return await self._stream.readexactly(max(error.consumed, 1))

    def close(self) -> None:
        """Read no more; whoever still writes gets SIGPIPE."""
        self._transport.close()
