"""Lines that repeat are counted, not written: a failure of a thousand times a second says so a few times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

SHOWN = 5
"""How often the same line is written within WINDOW_SECONDS."""
WINDOW_SECONDS = 60.0
REMEMBERED = 500
"""Different lines that are told apart at once; beyond that the oldest is forgotten early."""

Key = TypeVar("Key")


@dataclass(slots=True)
class _Seen:
    since: float
    times: int = 0


class Repeats(Generic[Key]):
    """Counts how often each line came lately. Times are of one monotonic clock."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: dict[Key, _Seen] = {}
        """The longest known first."""

    def admits(self, key: Key, now: float) -> bool:
        """Take in that a line came; whether it is to be written."""
        seen = self._seen.setdefault(key, _Seen(now))
        seen.times += 1
        return seen.times <= SHOWN

    def settled(self, now: float) -> list[tuple[Key, int]]:
        """Forget the lines whose window is over; return those of them that were kept back, and how often."""
        over = []
        for key, seen in list(self._seen.items()):
            if now - seen.since < WINDOW_SECONDS and len(self._seen) <= REMEMBERED:
                break
            del self._seen[key]
            if seen.times > SHOWN:
                over.append((key, seen.times - SHOWN))
        return over
