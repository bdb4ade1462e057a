"""One snapshot per second for all open pages: computed once for all readers, and only while there are readers."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

INTERVAL_SECONDS = 1.0


class TooManyReadersError(Exception):
    """The limit of readers is reached."""


class Feed:
    """Snapshots for a limited number of readers. A reader that is slow misses some, and delays nobody."""

    def __init__(self, make: Callable[[], Awaitable[bytes]], most: int, interval: float = INTERVAL_SECONDS) -> None:
        """make: returns the current snapshot. most: readers at once. interval: seconds between snapshots."""
        self._make = make
        self._most = most
        self._interval = interval
        self._readers = 0
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bytes | None] | None = None

    @property
    def readers(self) -> int:
        """Current number of readers."""
        return self._readers

    def admit(self) -> None:
        """Raise TooManyReadersError at the limit of readers, or after `close`."""
        if self._closed or self._readers >= self._most:
            raise TooManyReadersError

    async def read(self) -> AsyncGenerator[bytes, None]:
        """Yield a snapshot now, and the newest whenever there is another. Raises what `make` raises."""
        self.admit()
        self._readers += 1
        try:
            if self._task is None:
                self._task = asyncio.create_task(self._run())
            yield await self._make()
            while not self._closed:
                snapshot = await asyncio.shield(self._following())
                if snapshot is None:
                    break
                yield snapshot
            yield await self._make()
        finally:
            self._readers -= 1
            if not self._readers:
                await self._stop()

    def close(self) -> None:
        """Let every reader have one last snapshot, and end; there are no readers afterwards."""
        self._closed = True
        self._settle(None)

    def _following(self) -> asyncio.Future[bytes | None]:
        if self._next is None or self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        return self._next

    def _settle(self, snapshot: bytes | None) -> None:
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(snapshot)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            if self._next is None:
                continue
            try:
                self._settle(await self._make())
            except Exception as error:
                waiting, self._next = self._next, None
                if waiting is not None and not waiting.done():
                    waiting.set_exception(error)

    async def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
