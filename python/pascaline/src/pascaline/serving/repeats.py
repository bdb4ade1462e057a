"""Counts repeated lines instead of writing them: a failure a thousand times a second appears only a few times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

SHOWN = 5
"""How often the same line is written within WINDOW_SECONDS."""
WINDOW_SECONDS = 60.0
REMEMBERED = 500
"""Most different lines that are remembered; beyond that the oldest is forgotten early."""

Key = TypeVar("Key")


@dataclass(slots=True)
class _Seen:
    since: float
    times: int = 0


class Repeats(Generic[Key]):
    """Counts how often each line came within the window. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        """Start without lines."""
        self._seen: dict[Key, _Seen] = {}
        """Lines by the time of their first occurrence, oldest first."""

    def admits(self, key: Key, now: float) -> bool:
        """Count a line; return whether to write it."""
        seen = self._seen.setdefault(key, _Seen(now))
        seen.times += 1
        return seen.times <= SHOWN

    def settled(self, now: float) -> list[tuple[Key, int]]:
        """Forget the lines whose window is over; return those that were not always written, and how often not."""
        over = []
        for key, seen in list(self._seen.items()):
            if now - seen.since < WINDOW_SECONDS and len(self._seen) <= REMEMBERED:
                break
            del self._seen[key]
            if seen.times > SHOWN:
                over.append((key, seen.times - SHOWN))
        return over
