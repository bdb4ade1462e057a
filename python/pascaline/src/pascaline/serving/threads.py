"""Threads that nothing waits for, so that blocking work does not delay the end of the instance."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

M_ARENA_MAX = -8
"""<malloc.h>"""

BEGIN_SECONDS = 5.0
"""From the start of a thread to its first step, at most, on a machine under load. One without memory never begins."""

_OWN = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
        *(errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EDQUOT),
    }
)
"""Errors for a lack of file descriptors, memory, threads, local ports or disk space in this process."""


def is_own_failure(error: OSError) -> bool:
    """Whether this process lacks a resource, so that the error says nothing about the engine."""
    return error.errno in _OWN


def share_one_heap() -> None:
    """Let all threads of this process share one heap. Call this before the first thread starts.

    glibc gives each thread its own heap, here 8 MiB of resident memory, so that threads that allocate often do not wait
    for each other. Our threads mostly wait for files and sockets.
    """
    # Other C libraries do not have this setting.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def start_in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run a blocking function in its own thread and return a future; if that is cancelled, the result is ignored.

    Raises OSError (EAGAIN) if no thread can be started. A MemoryError in the function becomes OSError (ENOMEM), and so
    does a thread that does not begin.

    asyncio.to_thread does not do: at its end the interpreter waits for those threads, even for a checksum of 40 GB.
    threading.Thread does not do: its start waits until the thread runs, which is for ever if it gets no memory.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    # Reads the exception, so that asyncio does not report it as never retrieved.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    begun = False

    def work() -> None:
        nonlocal begun
        begun = True
        result: Any = None
        error: BaseException | None = None
        try:
            result = function(*arguments)
        except MemoryError:
            error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except Exception as caught:
            error = caught
        # The loop may already be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    def check() -> None:
        if not begun:
            settle(None, OSError(errno.ENOMEM, f"a thread did not begin within {BEGIN_SECONDS:g} s"))

    try:
        _thread.start_new_thread(work, ())
    except (RuntimeError, MemoryError) as caught:
        raise OSError(errno.EAGAIN, f"failed to start a thread: {caught}") from caught
    checking = loop.call_later(BEGIN_SECONDS, check)
    future.add_done_callback(lambda _: checking.cancel())
    return future
