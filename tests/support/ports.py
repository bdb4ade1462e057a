"""Free TCP ports for servers that a test starts a moment later.

From below the kernel's range for outgoing connections (32768 and up by default), and each process of a parallel run from
its own place in it: so nobody else takes the port between the question and the start.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
from pathlib import Path

LOWEST, HIGHEST = 10_240, 29_999
"""Away from the default ports 30000 and 30001."""
_ports = itertools.cycle(range(LOWEST, HIGHEST + 1))
for _ in range(random.Random(os.getpid()).randrange(HIGHEST - LOWEST)):
    next(_ports)


def free_port() -> int:
    """Return a port on which nothing listens now, and which this process has not returned in the last thousands of calls."""
    for port in itertools.islice(_ports, HIGHEST - LOWEST):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {LOWEST} to {HIGHEST} is free")


def this_process() -> str:
    """Return how an error names this process: the name now, which a worker of pytest-xdist changes with each test."""
    return f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
