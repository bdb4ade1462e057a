"""Prepares an engine's output for the log: whole lines, visible characters, a limited amount."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_LINE_BYTES = 64 * 1024
"""Longest line that is shown whole; of a longer one only the beginning is shown."""
LINES_PER_SECOND = 500
"""More than an engine normally writes. Further lines are counted, not shown, so that a flood of output costs little."""
BYTES_PER_SECOND = 256 * 1024
"""The same limit in bytes, for few long lines: the longest normal line of SGLang, its arguments, has 15 KiB."""

# C0 except tab, DEL, C1; characters that only some programs treat as a line's end; those that change text direction.
_INVISIBLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    r"""Return the text with each control character as its escape, such as \x1b: a log must not control a terminal."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of output."""

    text: str
    """The line without its end; if it is too long, its beginning."""
    size: int
    """Bytes of the whole line."""
    is_note: bool = False
    """Whether the engine did not write it: it says what is not shown."""


class Output:
    """The reading end of a pipe.

    asyncio's own pipe for a child does not do: asyncio waits for the end of pipe and child together, and a grandchild
    that left the process group can hold the pipe open for ever.
    """

    def __init__(self, stream: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        """Take over a stream; use `open`."""
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

    async def lines(self) -> AsyncIterator[Line]:
        """Yield each line. If one is longer than MAX_LINE_BYTES, yield its beginning at once, and a note at its end."""
        while piece := await self._read_piece():
            text, size = piece[:MAX_LINE_BYTES].decode(errors="replace").rstrip(), len(piece)
            if not piece.endswith(b"\n") and size >= MAX_LINE_BYTES:
                yield Line(text, size)
                while piece and not piece.endswith(b"\n"):
                    piece = await self._read_piece()
                    size += len(piece)
                text = f"WARNING: of a line of {size} bytes the first {MAX_LINE_BYTES} were shown"
                yield Line(text, len(text), is_note=True)
            else:
                yield Line(text, len(text))

    async def _read_piece(self) -> bytes:
        """Return the next line, or a piece of one that is longer than the limit; empty at the end."""
        try:
            return await self._stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            return await self._stream.readexactly(max(error.consumed, 1))

    def close(self) -> None:
        """Stop reading; processes that still write get SIGPIPE."""
        self._transport.close()


class Throttle:
    """Admits a limited number of lines and bytes in each second, and counts the dropped lines."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """clock: monotonic, in seconds."""
        self._clock = clock
        self._since = clock()
        self._lines = 0
        self._bytes = 0
        self._dropped = 0

    def admits(self, size: int) -> bool:
        """Whether a line of `size` bytes may be shown; counts it either way."""
        if self._lines >= LINES_PER_SECOND or self._bytes + size > BYTES_PER_SECOND:
            self._dropped += 1
            return False
        self._lines += 1
        self._bytes += size
        return True

    def dropped(self, *, at_end: bool = False) -> int:
        """If the current second is over, return the number of lines dropped in it and begin the next; otherwise 0."""
        if not at_end and self._clock() - self._since < 1.0:
            return 0
        dropped = self._dropped
        self._since, self._lines, self._bytes, self._dropped = self._clock(), 0, 0, 0
        return dropped
