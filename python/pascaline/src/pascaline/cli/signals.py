"""Signal handling for commands that have to clean up."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does, by KeyboardInterrupt, so that it cleans up."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C would do now.

    While a loop runs, asyncio's handler cancels the main task; an exception would break the loop and leave a traceback
    for each task. A background job of a shell ignores SIGINT; then this raises KeyboardInterrupt anyway.
    """
    on_sigint = signal.getsignal(signal.SIGINT)
    (on_sigint if callable(on_sigint) else signal.default_int_handler)(number, frame)
