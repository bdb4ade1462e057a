"""A service manager as far as a service meets it: the receiving end of sd_notify(3)."""

from __future__ import annotations

import contextlib
import socket
import threading


class ServiceManager:
    """The receiving end of sd_notify."""

    def __init__(self, address: str) -> None:
        """address: a path, or a name behind @."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(0.2)
        self._ended = threading.Event()
        self.messages: list[str] = []
        """All so far."""
        self._reader = threading.Thread(target=self._receive)
        self._reader.start()

    def _receive(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                self.messages.append(self._socket.recv(4096).decode())

    def close(self) -> None:
        """Listen no more."""
        self._ended.set()
        self._reader.join()
        self._socket.close()
