"""Locks between processes on files and folders (flock), let go of when the descriptor is closed or the process ends."""

from __future__ import annotations

import fcntl
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
    """Hold a lock file, which is made if it is missing. Raises OSError if it cannot be, and as `acquire` does."""
    with path.open("w") as file:
        acquire(file, wait=wait)
        yield
