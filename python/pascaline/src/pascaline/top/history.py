"""The latest values of each number, for sparklines."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.top.readings import HostReading

BARS = "▁▂▃▄▅▆▇█"
# One value per column of the widest sparkline.
LENGTH = 60


class History:
    """Values of one number per GPU or instance, oldest first."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], deque[float | None]] = {}

    def add(self, reading: HostReading) -> None:
        """Add the numbers of a reading that are drawn."""
        for gpu in reading.gpus:
            self._append((reading.host, "utilization", gpu.uuid), gpu.utilization_percent)
        for instance in reading.instances:
            self._append((reading.host, "tokens", str(instance.agent_port)), instance.tokens_per_second)

    def of(self, host: str, what: str, key: str) -> list[float | None]:
        """Return the values of a GPU's `utilization` (key: uuid) or an instance's `tokens` (key: agent's port)."""
        return list(self._values.get((host, what, key), ()))

    def _append(self, key: tuple[str, str, str], value: float | None) -> None:
        self._values.setdefault(key, deque(maxlen=LENGTH)).append(value)


def sparkline(values: list[float | None], width: int, top: float | None = None) -> str:
    """Draw the newest `width` values, right-aligned, with a gap for None. A full bar is `top`, or the highest value."""
    shown = values[-width:] if width > 0 else []
    known = [value for value in shown if value is not None]
    full = top if top is not None else max(known, default=0.0)
    drawn = "".join(" " if value is None else _bar(value, full) for value in shown)
    return drawn.rjust(width)


def _bar(value: float, full: float) -> str:
    share = min(max(value / full, 0.0), 1.0) if full > 0 else 0.0
    return BARS[round(share * (len(BARS) - 1))]
