"""What an engine writes, made fit for a log: whole lines, visible characters, and no more of them than help."""

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
"""Of a longer line the beginning is shown."""
LINES_PER_SECOND = 500
"""More than an engine says in earnest; what exceeds it is counted, not shown, so that a flood costs nothing."""
BYTES_PER_SECOND = 256 * 1024
"""The same in bytes, for few long lines: SGLang's longest in earnest, its arguments, has 15 KiB."""

# C0 but tab, DEL, C1; what ends a line to some programs and not to others; what changes the direction of writing.
_INVISIBLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    r"""Return the text with each control character as its escape, such as \x1b: a log must not steer a terminal."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of output."""

    text: str
    """Without its end; of a long line the beginning."""
    size: int
    """Bytes of the whole line."""


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

    async def lines(self) -> AsyncIterator[Line]:
        """Yield each line; of one that is longer than MAX_LINE_BYTES the beginning at once, its size at its end."""
        while piece := await self._read_piece():
            text, size = piece[:MAX_LINE_BYTES].decode(errors="replace").rstrip(), len(piece)
            if not piece.endswith(b"\n") and size >= MAX_LINE_BYTES:
                yield Line(text, size)
                while piece and not piece.endswith(b"\n"):
                    piece = await self._read_piece()
                    size += len(piece)
                text = f"WARNING: of a line of {size} bytes the first {MAX_LINE_BYTES} were shown"
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
        """Read no more; whoever still writes gets SIGPIPE."""
        self._transport.close()


class Throttle:
    """Lets so many lines and bytes through in each second, and counts the others."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._since = clock()
        self._lines = 0
        self._bytes = 0
        self._dropped = 0

    def admits(self, size: int) -> bool:
        """Whether a line of so many bytes may be shown."""
        if self._lines >= LINES_PER_SECOND or self._bytes + size > BYTES_PER_SECOND:
            self._dropped += 1
            return False
        self._lines += 1
        self._bytes += size
        return True

    def dropped(self, *, at_end: bool = False) -> int:
        """Begin the next second where this one is over, and return how many lines this one dropped; else 0."""
        if not at_end and self._clock() - self._since < 1.0:
            return 0
        dropped = self._dropped
        self._since, self._lines, self._bytes, self._dropped = self._clock(), 0, 0, 0
        return dropped
