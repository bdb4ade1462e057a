"""The agent's connections: so many at once, and each only for a while without a whole request.

Whoever opens a thousand connections and says nothing must not take from the watch over the engine what it needs. Where
all are taken a new one displaces the oldest: who asks and listens is served within milliseconds, long before its turn.
"""

from __future__ import annotations

import asyncio
import functools
import resource
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 64
"""More than probes, scrapers and people need at once."""
LEAST_CONNECTIONS = 4
RESERVED_DESCRIPTORS = 64
"""For the engine's pipes, the questions that it is asked, files and libraries."""
WANTED_DESCRIPTORS = 4096
QUIET_SECONDS = 10.0
"""From its opening or last answer to the end of a connection, whatever trickles in meanwhile."""


def raise_descriptor_limit(wanted: int = WANTED_DESCRIPTORS) -> int:
    """Raise the soft limit of open files as far as allowed and wanted; return what holds. The engine inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return max(soft, raised)


def connection_limit(descriptors: int) -> int:
    """Return how many connections may be open of so many descriptors.

    Half of what is not reserved: as many again may be accepted in one go, before the first of them is counted.
    """
    return max(LEAST_CONNECTIONS, min(MOST_CONNECTIONS, (descriptors - RESERVED_DESCRIPTORS) // 2))


@dataclass(slots=True)
class Connections:
    """The open ones, the longest quiet first."""

    most: int
    quiet_seconds: float = QUIET_SECONDS
    _open: dict[asyncio.Transport, asyncio.TimerHandle] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def heard(self, transport: asyncio.Transport) -> None:
        """Take in that a connection was opened, or that a request of it was answered."""
        self.closed(transport)
        while len(self._open) >= self.most:
            self._end(next(iter(self._open)))
        loop = asyncio.get_running_loop()
        self._open[transport] = loop.call_later(self.quiet_seconds, self._end, transport)

    def closed(self, transport: asyncio.Transport) -> None:
        """Forget a connection."""
        if timer := self._open.pop(transport, None):
            timer.cancel()

    def _end(self, transport: asyncio.Transport) -> None:
        self.closed(transport)
        transport.abort()


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits: it has none for a request that never becomes whole."""

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        """connections: shared by all of one server."""
        super().__init__(*arguments, **options)
        self._bounded_by = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count it in."""
        self._bounded_by.heard(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out."""
        self._bounded_by.closed(self.transport)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Give it time for another request."""
        if not self.transport.is_closing():
            self._bounded_by.heard(self.transport)
        super().on_response_complete()


def bounded_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Return the protocol as uvicorn wants it: a class."""
    return type(
        "AgentProtocol",
        (BoundedProtocol,),
        {"__init__": functools.partialmethod(BoundedProtocol.__init__, connections)},
    )
