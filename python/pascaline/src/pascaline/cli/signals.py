"""Signals of the commands that have something to clean up."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does, by KeyboardInterrupt: what it started or half made goes too."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C would do now: while a loop runs asyncio cancels its main task, where an exception would tear the
    loop apart and leave a traceback for each task. A shell's background job ignores Ctrl-C, but not this.
    """
    on_sigint = signal.getsignal(signal.SIGINT)
    (on_sigint if callable(on_sigint) else signal.default_int_handler)(number, frame)
