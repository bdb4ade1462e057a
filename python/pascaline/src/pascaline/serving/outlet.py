"""A stream that never blocks those who write to it: a thread passes on, and what nobody reads in time is dropped.

A reader of the log may stop for ever (Ctrl-S in a terminal, a journal that is stuck, a full pipe) or go away. What it
misses is counted, and told in one line once it reads again.
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
"""What may wait for a reader: more than an engine says while it loads."""
CLOSE_SECONDS = 2.0
"""How long the end of the program waits for a reader."""


class Outlet:
    """Takes the place of a text stream that writes to a file descriptor. Safe to use from any thread."""

    def __init__(self, descriptor: int, note: Callable[[int], str], *, capacity: int = QUEUE_BYTES) -> None:
        """note: makes the text that tells of so many lines dropped. capacity: bytes that may wait."""
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
        """Whether the last write succeeded: a note is worth a try."""
        self._writing = False
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._pass_on, daemon=True, name="log").start()

    def write(self, text: str) -> int:
        """Take a text in, or drop it where too much waits already."""
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
        """Whether a person may be reading."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """The descriptor that is written to."""
        return self._descriptor

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait for what is not written yet; where it stays unread, send all that others still write to nowhere.

        Without that, the program's last words would wait for the reader for ever.
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
        """Wait for the next piece: a text, or the note of those that were dropped before it; None at the end."""
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
            # Its reader went away, the terminal is closed, the disk is full.
            self._flows = False
            self._drop(data)
        else:
            self._flows = True

    def _write_some(self, data: memoryview) -> int:
        with suppress(BlockingIOError):
            return os.write(self._descriptor, data)
        # Somebody else who has this file open switched it to non-blocking.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        poll.poll()
        return 0

    def _drop(self, data: bytes) -> None:
        lines = max(data.count(b"\n"), 1)
        with self._changed:
            self._untold += lines
        self.on_lost(lines)
