"""The folder of one instance for files that live as long as it does, such as the one with the API key.

It is this user's alone, made anew where a cleaner of temporary files took it away, and removed at the end. After a
SIGKILL the next instance removes it: each holds a lock on its own folder, which the kernel takes back with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "pascaline-serve-"
_UNFINISHED = ".pascaline-serve-"
"""A folder that has no lock yet: what begins with PREFIX has one, or belonged to an instance that is gone."""


class RuntimeFolder:
    """A context manager; `path` makes the folder where it is not there."""

    def __init__(self) -> None:
        """Nothing is made before `path` is asked for."""
        self._path: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> RuntimeFolder:
        """Remove what instances left that were killed."""
        for left in left_behind():
            shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder."""
        if self._is_there():
            shutil.rmtree(self._path or "", ignore_errors=True)
        self._release()

    def path(self) -> Path:
        """Return the folder, of mode 0700; OSError where it can not be made."""
        if self._path is None or not self._is_there():
            self._release()
            self._path, self._lock = _make()
        return self._path

    def _is_there(self) -> bool:
        """Whether the folder of this name is still the one that was made, and not somebody's in its place."""
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
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = unfinished.with_name(PREFIX + unfinished.name.removeprefix(_UNFINISHED))
        unfinished.rename(path)
    except OSError:
        os.close(lock)
        raise
    return path, lock


def left_behind() -> Iterator[Path]:
    """Yield the folders of this user whose instance is gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not _is_locked(path):
                yield path


def _is_locked(path: Path) -> bool:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(folder)
    return False
