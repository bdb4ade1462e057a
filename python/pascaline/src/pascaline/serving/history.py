"""Speed of the engine over the last minutes, from the counters that are read anyway: a fixed number of points."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pascaline.engines import Vitals

POINT_SECONDS = 5.0
"""Time that a point covers."""
POINTS = 120
"""Ten minutes."""


class Point(NamedTuple):
    """What was measured in the seconds before a time."""

    at: float
    """Unix time."""
    tokens_per_second: float | None
    """None: the engine does not count its tokens."""
    ttft_seconds: float | None
    """Mean time to first token; None: no first token was sent."""


class History:
    """The last points, oldest first. An engine that restarts begins to count at zero: its first values are no rate."""

    def __init__(self) -> None:
        """Start without points."""
        self.points: deque[Point] = deque(maxlen=POINTS)
        self._before: tuple[float, Vitals] | None = None

    def add(self, at: float, vitals: Vitals) -> None:
        """Take in counters read at a Unix time; most calls only wait until a point's time is over."""
        if self._before is None or _restarted(self._before[1], vitals) or at < self._before[0]:
            self._before = (at, vitals)
            return
        began, before = self._before
        if at - began < POINT_SECONDS:
            return
        rate = _difference(before.generated, vitals.generated)
        count, seconds = (
            _difference(before.ttft_count, vitals.ttft_count),
            _difference(before.ttft_seconds, vitals.ttft_seconds),
        )
        ttft = seconds / count if count and seconds is not None else None
        self.points.append(Point(at, None if rate is None else rate / (at - began), ttft))
        self._before = (at, vitals)

    def forget_counters(self) -> None:
        """Record that the engine ended: the next counters belong to another run."""
        self._before = None


def _restarted(before: Vitals, now: Vitals) -> bool:
    pairs = ((before.generated, now.generated), (before.ttft_count, now.ttft_count))
    return any(earlier is not None and (later is None or later < earlier) for earlier, later in pairs)


def _difference(before: float | None, now: float | None) -> float | None:
    """Return the growth; a labelled counter is absent before its first use, which is 0. None: still absent."""
    return None if now is None else now - (before or 0.0)
