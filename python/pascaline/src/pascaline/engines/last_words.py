"""Finds the line of an engine's last output that best explains its end: the error, not its consequences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_TRACEBACK = "Traceback (most recent call last):"
# The first line after the frames: an exception class, with or without its module, and usually a message.
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: .*|:)?$")
# What Python and C++ write when they abort without an exception to show.
_FATAL = re.compile(r"Fatal Python error: .+|^\s*what\(\):\s+.+|terminate called .+")
_CONSEQUENCE = re.compile(
    r"(?:\w+\.)*(?:EOFError|BrokenPipeError|ConnectionResetError|ConnectionRefusedError|CancelledError|KeyboardInterrupt"
    r"|SystemExit)\b|RuntimeError: (?:Initialization failed|Rank \d+ scheduler)"
)
"""What a process reports because another one died: SGLang's main process and asyncio."""
ERRORS = frozenset({"ERROR", "CRITICAL"})
RECENT_LINES = 60
"""If more lines than these follow an exception, it did not end the engine."""
CLUSTER_LINES = 20
"""Errors with fewer other lines between them belong together."""


def exceptions(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (index, line) of the first exception of each traceback: in a chain of exceptions that is the cause."""
    chained = False
    for number, line in enumerate(lines):
        if line.endswith(_TRACEBACK):
            if not chained and (found := _exception_after(lines, number + 1)):
                yield found, lines[found]
            chained = False
        elif line.startswith(("The above exception was", "During handling of the above exception")):
            chained = True


def _exception_after(lines: Sequence[str], start: int) -> int | None:
    for number in range(start, len(lines)):
        if not lines[number].startswith((" ", "\t")):
            return number if _EXCEPTION.match(lines[number]) else None
    return None


def cause_of_traceback(lines: Sequence[str]) -> str | None:
    """Return the last recent exception, preferably one that another process's end did not cause; None if none."""
    found = [text for number, text in exceptions(lines) if number >= len(lines) - RECENT_LINES]
    causes = [each for each in found if not _CONSEQUENCE.match(each)]
    return causes[-1] if causes else found[-1] if found else None


def fatal_words(lines: Sequence[str]) -> str | None:
    """Return the first line that a language runtime wrote when it aborted; None without such a line."""
    return next((line.strip() for line in lines if _FATAL.search(line)), None)


def first_of_last_errors(lines: Sequence[str], level: Callable[[str], str]) -> str | None:
    """Return the first line of the last cluster of errors, by each line's level; None if no line is an error."""
    found, others = None, 0
    for line in reversed(lines):
        if level(line) in ERRORS:
            found, others = line, 0
        elif found is not None:
            others += 1
            if others >= CLUSTER_LINES:
                break
    return found
