"""The folders that a service manager gives to one instance alone, each held by a lock while the instance lives.

Two instances with one of them would replace each other's socket and count of starts. The lock is flock's on the folder
itself: the kernel releases it when the process ends, however it ends, and it leaves no file behind.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline import file_locks
from pascaline.errors import PortInUseError

if TYPE_CHECKING:
    from collections.abc import Mapping

RUNTIME = "RUNTIME_DIRECTORY"
STATE = "STATE_DIRECTORY"
"""Variables of systemd.exec(5)."""
PATIENCE_SECONDS = 1.0
"""systemd-tmpfiles locks a folder for a moment while it looks for old files."""
_POLL_SECONDS = 0.05
_LOCKS = Path("/proc/locks")


class OwnFolders:
    """A context manager that releases the folders which `hold` locked."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Hold nothing yet."""
        self._environment = environment
        self._held: list[int] = []

    def __enter__(self) -> OwnFolders:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release all."""
        while self._held:
            os.close(self._held.pop())

    def hold(self, variable: str) -> Path | None:
        """Lock the first folder that a variable names, and return it; None if it names none.

        Raises PortInUseError, which names the other instance, if one holds it; OSError if it cannot be locked.
        """
        name = self._environment.get(variable, "").partition(":")[0]
        if not name:
            return None
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if any(os.path.samestat(os.fstat(folder), os.fstat(held)) for held in self._held):
            os.close(folder)
            return Path(name)
        try:
            _acquire(folder, PATIENCE_SECONDS)
        except BlockingIOError as error:
            found = _holder(folder)
            held = f" by {found}" if found else ""
            os.close(folder)
            raise PortInUseError(
                f"{variable}: {name} is in use{held}; stop that process, or give each instance a folder of its own"
            ) from error
        except OSError:
            os.close(folder)
            raise
        self._held.append(folder)
        return Path(name)


def _acquire(folder: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return file_locks.acquire(folder, wait=False)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _holder(folder: int) -> str | None:
    """Return "name (pid N)" of the process that locked an open folder; None if it cannot be seen (proc_locks(5))."""
    found = os.fstat(folder)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    try:
        for line in _LOCKS.read_text().splitlines():
            _, kind, _, _, pid, locked, *_ = line.split()
            if (kind, locked) == ("FLOCK", file):
                return f"{Path('/proc', pid, 'comm').read_text().strip()} (pid {pid})"
    except (OSError, ValueError):
        return None
    return None
