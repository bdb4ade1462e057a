"""Signals of the commands that have something to clean up."""

from __future__ import annotations

import signal


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does, by KeyboardInterrupt: what it started or half made goes too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
