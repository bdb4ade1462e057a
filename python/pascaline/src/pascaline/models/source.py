"""Sources of model headers: a file on disk here, a URL in remote.py. Both return bytes at an offset."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pascaline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Source(Protocol):
    """Bytes of one model file."""

    @property
    def name(self) -> str:
        """Path or URL, as messages show it."""

    @property
    def size(self) -> int:
        """Bytes in the whole file."""

    @property
    def chunk_bytes(self) -> int:
        """Sensible number of bytes for one read."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises ModelError if the file is shorter."""


class FileSource:
    """A regular file on disk. If it shrinks, pread fails with an error, while mmap would end in SIGBUS."""

    chunk_bytes = 1 << 20

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.name = str(path)
        self.size = size
        self._descriptor = descriptor

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ModelError(f"failed to read {self.name}: {error.strerror}") from error
        if len(data) < size:
            raise ModelError(
                f"failed to read {self.name}: it shrank from {self.size} bytes to {offset + len(data)} or fewer "
                "while it was read; wait until nothing writes to it, then try again"
            )
        return data


def file_mode(path: Path) -> int | None:
    """Type and permissions of a file, as os.stat returns them; None if there is no such file."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"failed to read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"failed to read {str(path)!a}: {error}") from error


@contextmanager
def open_file(path: Path) -> Iterator[FileSource]:
    """Open a regular file for reading; a FIFO or a device is refused before it could block."""
    try:
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"failed to read {path}: {error.strerror}") from error
    try:
        # Check again: another file may have taken the name between the two calls.
        status = os.fstat(descriptor)
        _require_regular(path, status.st_mode)
        yield FileSource(path, descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = next((kind for test, kind in _KINDS if test(mode)), "not a regular file")
    raise ModelError(f"failed to read {path}: it is {kind}, must be a regular file")


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
