"""Waits until SGLang's own server listens."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS: Final = 60.0
"""uvicorn listens some milliseconds after the application is complete; more than that only on an overloaded host."""
_POLL_SECONDS: Final = 0.05


def when_listening(original: Callable[[Any], Any], server_args: Any) -> Any:
    """Wrap a function that asks the server: call it once the server listens, or after SECONDS."""
    wait(server_args.url(), SECONDS)
    return original(server_args)


def wait(url: str, seconds: float) -> bool:
    """Return True once somebody accepts connections at the URL's host and port, False if nobody does in time."""
    parts = urlsplit(url)
    address = parts.hostname or "127.0.0.1", parts.port or 80
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=1.0).close()
        except OSError:
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False
