"""What a person sees while a benchmark runs: a bar on a terminal, otherwise a line for each run."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from pascaline.bench.metrics import METRICS, metrics_of_run

if TYPE_CHECKING:
    from pascaline.bench.run_result import Run

BAR_CELLS = 24
RENEW_SECONDS = 0.5
"""Least time between two drawings of the bar: drawing is part of the CPU time that is measured."""
_SHOWN = ("output_throughput", "ttft_p50", "itl_p50", "error_ratio")


class Progress:
    """One line at the bottom, redrawn in place."""

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        """steps: number of runs, for the bar. stream: None = standard error."""
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._steps = max(1, steps)
        self._done = 0.0
        self._label = ""
        self._drawn = 0.0
        self._waited_for = ""

    def say(self, text: str) -> None:
        """Write a line that stays visible."""
        self._clear()
        self._stream.write(f"{text}\n")
        self._draw(force=True)
        self._stream.flush()

    def waiting(self, seconds: float, state: str) -> None:
        """Show that the instance is starting."""
        if self._terminal:
            self._label = f"starting the instance: {state}, {seconds:.0f} s"
            self._draw()
        elif state != self._waited_for:
            self._waited_for = state
            self.say(f"starting the instance: {state}")

    def skipped(self, runs: int) -> None:
        """Count runs that are left out."""
        self._done += runs

    def running(self, label: str, share: float) -> None:
        """Show how much of a run is done."""
        if self._terminal:
            self._label = label
            self._draw(share)

    def finished(self, label: str, run: Run) -> None:
        """Show the outcome of a run."""
        self._done += 1
        found = metrics_of_run(run)
        shown = [
            f"{METRICS[key].title} {found[key] * METRICS[key].factor:.1f} {METRICS[key].unit}"
            for key in _SHOWN
            if key in found and (key != "error_ratio" or found[key] > 0)
        ]
        self.say(f"{label}: {', '.join(shown)}")

    def close(self) -> None:
        """Remove the bar."""
        self._clear()
        self._terminal = False
        self._stream.flush()

    def _draw(self, share: float = 0.0, *, force: bool = False) -> None:
        now = time.monotonic()
        if not self._terminal or not self._label or (not force and now - self._drawn < RENEW_SECONDS):
            return
        self._drawn = now
        part = min(1.0, (self._done + share) / self._steps)
        bar = ("█" * round(BAR_CELLS * part)).ljust(BAR_CELLS, "·")
        self._stream.write(f"\r\033[K{bar} {part:4.0%}  {self._label}"[:200])
        self._stream.flush()

    def _clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\033[K")
