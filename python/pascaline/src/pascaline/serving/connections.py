"""Limits the agent's connections: their number, and the time that each may stay open without a complete request.

A client that opens a thousand silent connections must not take the descriptors that watching the engine needs. At the
limit, a new connection displaces the one that was quiet longest. A normal request is answered within milliseconds, long
before that.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pascaline.descriptors import QUIET_SECONDS

HEARD = "heard"
"""Name in a request's `state` of a function that an endless answer calls whenever its client has read a part."""


@dataclass(slots=True)
class Connections:
    """The open connections, the one that was quiet longest first."""

    most: int
    quiet_seconds: float = QUIET_SECONDS
    _open: dict[asyncio.Transport, asyncio.TimerHandle] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._open)

    def heard(self, transport: asyncio.Transport) -> None:
        """Record that a connection was opened, or that a request on it was answered."""
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
    """uvicorn's HTTP protocol with limits: uvicorn has none for a request that never becomes complete."""

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        """connections: shared by all protocols of one server."""
        super().__init__(*arguments, **options)
        self._bounded_by = connections
        self.app_state = {**self.app_state, HEARD: self._still_read}

    def _still_read(self) -> None:
        """Allow more time for an answer that goes on, because its client has read what was sent so far."""
        if not self.transport.is_closing():
            self._bounded_by.heard(self.transport)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Count the connection."""
        self._bounded_by.heard(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        self._bounded_by.closed(self.transport)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Allow time for another request."""
        self._still_read()
        super().on_response_complete()


def bounded_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Return the protocol as a class, which uvicorn requires."""
    return type(
        "AgentProtocol",
        (BoundedProtocol,),
        {"__init__": functools.partialmethod(BoundedProtocol.__init__, connections)},
    )
