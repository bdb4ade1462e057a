"""Threads that nobody waits for: what they still do when the instance ends must not delay its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

M_ARENA_MAX = -8
"""<malloc.h>"""

_OWN = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
        *(errno.EADDRNOTAVAIL, errno.ENOSPC, errno.EDQUOT),
    }
)
"""What a lack of descriptors, memory, threads, ports of our own, or room on a disk ends with."""


def is_own_failure(error: OSError) -> bool:
    """Whether an error says that this process lacks something, and nothing of whom it wanted to ask."""
    return error.errno in _OWN


def share_one_heap() -> None:
    """Let the threads of this process share one heap, as long as it has none yet.

    glibc gives each a heap of its own, 8 MiB of resident memory here, to spare threads that allocate all the time from
    waiting for each other. Ours wait for files and sockets.
    """
    # Another C library has no such setting.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def start_in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Run something that blocks in a thread of its own; a cancelled future ignores what comes of it.

    Raises OSError (EAGAIN) where no thread can be started; a MemoryError of the function is OSError (ENOMEM).

    Not asyncio.to_thread: the interpreter waits for its threads, be it for the checksum of 40 GB.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    # An error that nobody asks for any more is no news.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = function(*arguments)
        except MemoryError:
            error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        except Exception as caught:
            error = caught
        # The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=work, daemon=True, name=getattr(function, "__name__", None)).start()
    except (RuntimeError, MemoryError) as caught:
        raise OSError(errno.EAGAIN, f"failed to start a thread: {caught}") from caught
    return future
