"""Shows the progress of loading: one line that is overwritten on a terminal, ten lines in a log."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final, TextIO

logger = logging.getLogger(__name__)

BAR_WIDTH: Final = 32
LOG_STEPS: Final = 10
"""Number of lines in a log from start to end."""
REDRAW_SECONDS: Final = 0.1


class LoadingProgress:
    """Counts bytes of the file; a context manager that ends the line on a terminal."""

    def __init__(self, total_bytes: int, stream: TextIO | None = None) -> None:
        """stream: may be a terminal; None = standard error."""
        self._total = max(1, total_bytes)
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._done = 0
        self._start = time.monotonic()
        self._last_drawn = 0.0
        self._last_step = 0

    def __enter__(self) -> LoadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._last_drawn:
            self._stream.write("\n")
            self._stream.flush()

    def add(self, n_bytes: int) -> None:
        """Count n_bytes as loaded."""
        self._done += n_bytes
        if self._is_terminal:
            self._draw()
        elif (step := LOG_STEPS * self._done // self._total) > self._last_step:
            self._last_step = step
            logger.info("%s", self.text())

    def text(self) -> str:
        """Return a text such as `loading weights: 40 % of 4.92 GB, 1.31 GB/s`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        share = min(100, 100 * self._done // self._total)
        return f"loading weights: {share:3d} % of {self._total / 1e9:.2f} GB, {self._done / seconds / 1e9:.2f} GB/s"

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._last_drawn < REDRAW_SECONDS and self._done < self._total:
            return
        self._last_drawn = now
        filled = BAR_WIDTH * min(self._done, self._total) // self._total
        self._stream.write(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {self.text()}")
        self._stream.flush()
