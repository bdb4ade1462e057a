"""systemd's notification protocol: datagrams of NAME=VALUE lines to $NOTIFY_SOCKET; does nothing if that is not set.

Never blocks: a manager that restarts or does not read gets the missed values with the next message.

This uses no package: the protocol is one datagram, and this module decides what happens if nobody receives it.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pascaline.redaction import redact
from pascaline.serving.output import visible

if TYPE_CHECKING:
    from collections.abc import Mapping

MICROSECONDS = 1_000_000
MAX_STATUS_BYTES = 2000
"""systemd ignores a datagram beyond 4096 bytes (NOTIFY_BUFFER_MAX), with everything else that is in it."""


@dataclass(slots=True)
class Notifier:
    """The service manager's socket, and the interval in which it expects a sign of life."""

    address: str | None
    """None: no service manager listens."""
    watchdog_seconds: float | None
    """None: the unit has no WatchdogSec."""
    _unsent: dict[str, str] = field(default_factory=dict, init=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notifier:
        """Read $NOTIFY_SOCKET, $WATCHDOG_USEC and $WATCHDOG_PID; values meant for another process are ignored."""
        microseconds = environment.get("WATCHDOG_USEC", "")
        for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog = int(microseconds) / MICROSECONDS if for_us and microseconds.isdigit() else None
        return cls(environment.get("NOTIFY_SOCKET"), watchdog)

    def ready(self) -> None:
        """Report that the service is ready."""
        self._send("READY", "1")

    def stopping(self) -> None:
        """Report that the service is stopping."""
        self._send("STOPPING", "1")

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        shown = visible(redact(text).replace("\n", " ")).encode(errors="replace")
        self._send("STATUS", shown[:MAX_STATUS_BYTES].decode(errors="ignore"))

    def watchdog(self) -> None:
        """Report that the main loop still runs."""
        if self.watchdog_seconds is not None:
            self._send("WATCHDOG", "1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for this much more time to start or to stop, from now on."""
        self._send("EXTEND_TIMEOUT_USEC", str(int(seconds * MICROSECONDS)))

    def _send(self, name: str, value: str) -> None:
        if not self.address:
            return
        self._unsent[name] = value
        message = "\n".join(f"{name}={value}" for name, value in self._unsent.items())
        # A leading @ means the zero byte of an abstract socket's address.
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        # The message also waits if no file descriptor is free.
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                connection.sendto(message.encode(errors="replace"), socket.MSG_DONTWAIT, address)
            self._unsent.clear()
