"""A progress bar on standard error: updated in place on a terminal, otherwise one line for every tenth."""

from __future__ import annotations

import shutil
import sys
from time import monotonic
from typing import TextIO

from pascaline.units import format_bytes

RENEW_SECONDS = 0.1
BAR_CHARACTERS = 24


class ByteBar:
    """Progress in bytes, with speed and remaining time."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        """stream: None means standard error."""
        self._label = label
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = monotonic()
        self._first: int | None = None
        self._shown_at = 0.0
        self._shown_tenth = -1

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` bytes are done; total: None if unknown."""
        if self._first is None or done < self._first:
            self._first, self._began = done, monotonic()
        if self._terminal:
            ended = total is not None and done >= total
            if ended or monotonic() - self._shown_at >= RENEW_SECONDS:
                self._shown_at = monotonic()
                width = shutil.get_terminal_size().columns - 1
                self._stream.write("\r\033[K" + self._line(done, total)[:width] + ("\n" if ended else ""))
                self._stream.flush()
        elif total and (tenth := 10 * done // total) > self._shown_tenth:
            self._shown_tenth = tenth
            self._stream.write(self._line(done, total) + "\n")

    def _line(self, done: int, total: int | None) -> str:
        seconds = monotonic() - self._began
        speed = (done - (self._first or 0)) / seconds if seconds > 0 else 0.0
        if not total:
            return f"{self._label} {format_bytes(done)}, {format_bytes(speed)}/s"
        share = done / total
        bar = ("█" * round(BAR_CHARACTERS * share)).ljust(BAR_CHARACTERS, "·")
        left = f", {(total - done) / speed:.0f} s left" if speed > 0 and done < total else ""
        return f"{self._label} {bar} {share:4.0%} of {format_bytes(total)}, {format_bytes(speed)}/s{left}"
