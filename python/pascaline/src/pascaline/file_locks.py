"""Locks between processes on files and folders (flock), let go of when the descriptor is closed or the process ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import IO


def acquire(file: IO[str] | int, *, wait: bool = True) -> None:
    """Lock an open file or folder until it is closed. Raises BlockingIOError if it is held and wait is False."""
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(file: IO[str] | int) -> bool:
    """Say whether somebody else holds the lock of a file or folder that is open here."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is made if it is missing. Raises OSError if it cannot be, and as `acquire` does.

    A symbolic link is not followed, and nothing is truncated: the folder may be one that others can write to.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        acquire(file, wait=wait)
        yield
    finally:
        os.close(file)
