"""The folder of one instance for files that live as long as the instance, such as the one with the API key.

Only this user may open it. It is created again if a cleaner of temporary files removed it, and is removed at the end.
After a SIGKILL the next instance removes it: each instance holds a lock on its folder, which the kernel releases when
the process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline import file_locks

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "pascaline-serve-"
_UNFINISHED = ".pascaline-serve-"
"""Prefix of a folder without a lock yet. A folder with PREFIX has a lock, or belongs to an instance that is gone."""


class RuntimeFolder:
    """A context manager; `path` creates the folder if it does not exist."""

    def __init__(self) -> None:
        """Create nothing yet; `path` does."""
        self._path: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> RuntimeFolder:
        """Remove the folders of instances that were killed."""
        for left in left_behind():
            shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder."""
        if self._is_there():
            shutil.rmtree(self._path or "", ignore_errors=True)
        self._release()

    def path(self) -> Path:
        """Return the folder, with mode 0700. Raises OSError if it cannot be created."""
        if self._path is None or not self._is_there():
            self._release()
            self._path, self._lock = _make()
        return self._path

    def _is_there(self) -> bool:
        """Whether the folder of this name is still the one that this instance created."""
        if self._path is None or self._lock is None:
            return False
        try:
            return os.path.samestat(os.lstat(self._path), os.fstat(self._lock))
        except OSError:
            return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _make() -> tuple[Path, int]:
    parent = Path(tempfile.gettempdir())
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
    lock = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file_locks.acquire(lock, wait=False)
        path = unfinished.with_name(PREFIX + unfinished.name.removeprefix(_UNFINISHED))
        unfinished.rename(path)
    except OSError:
        os.close(lock)
        raise
    return path, lock


def left_behind() -> Iterator[Path]:
    """Yield the folders of this user whose instance is gone."""
    try:
        parent = Path(tempfile.gettempdir())
    except OSError:
        return  # no folder for temporary files is writable, so nothing can be removed there
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not _is_locked(path):
                yield path


def _is_locked(path: Path) -> bool:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return file_locks.is_held(folder)
    finally:
        os.close(folder)
