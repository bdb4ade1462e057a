"""A stream that never blocks its writers: a thread writes the text, and drops what is not read in time.

A reader of the log may stop for ever (Ctrl-S in a terminal, a journal that is stuck, a full pipe) or go away. The lines
that it misses are counted, and reported in one line once it reads again.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

QUEUE_BYTES = 2**20
"""Most bytes that wait for a reader: more than an engine writes while it loads."""
CLOSE_SECONDS = 2.0
"""How long the program waits for a reader when it ends."""


class Outlet:
    """Replaces a text stream that writes to a file descriptor. Safe to use from any thread."""

    def __init__(self, descriptor: int, note: Callable[[int], str], *, capacity: int = QUEUE_BYTES) -> None:
        """note: makes the text that reports a number of dropped lines. capacity: bytes that may wait."""
        self.on_lost: Callable[[int], None] = lambda _: None
        """Called with the number of lines whenever some are dropped, from any thread."""
        self._descriptor = descriptor
        self._note = note
        self._capacity = capacity
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._untold = 0
        """Lines dropped since the last note."""
        self._flows = True
        """Whether the last write succeeded; only then is a note written."""
        self._writing = False
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._pass_on, daemon=True, name="log").start()

    def write(self, text: str) -> int:
        """Queue a text, or drop it if the queue is full."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            fits = self._waiting_bytes + len(data) <= self._capacity
            if fits:
                self._waiting.append(data)
                self._waiting_bytes += len(data)
                self._changed.notify_all()
        if not fits:
            self._drop(data)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread writes at once."""

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor that is written to."""
        return self._descriptor

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until the queue is written. If nobody reads it within `seconds`, redirect the descriptor to /dev/null.

        Otherwise the program's last output would wait for the reader for ever.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._waiting and not self._writing, seconds)
        if not done:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)

    def _pass_on(self) -> None:
        while (data := self._next()) is not None:
            self._put(data)

    def _next(self) -> bytes | None:
        """Wait for the next piece: a text, or the note about dropped lines; None at the end."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or (self._untold and self._flows) or self._closed)
            self._writing = True
            if self._waiting:
                data = self._waiting.popleft()
                self._waiting_bytes -= len(data)
                return data
            if self._untold and self._flows:
                untold, self._untold = self._untold, 0
                return self._note(untold).encode()
            self._writing = False
            self._changed.notify_all()
            return None

    def _put(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[self._write_some(left) :]
        except OSError:
            # The reader is gone, the terminal is closed, or the disk is full.
            self._flows = False
            self._drop(data)
        else:
            self._flows = True

    def _write_some(self, data: memoryview) -> int:
        with suppress(BlockingIOError):
            return os.write(self._descriptor, data)
        # Another process that has this file open made it non-blocking.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()
        return 0

    def _drop(self, data: bytes) -> None:
        lines = max(data.count(b"\n"), 1)
        with self._changed:
            self._untold += lines
        self.on_lost(lines)
