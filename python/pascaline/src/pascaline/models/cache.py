"""The cache folder, all of which can be deleted at any time: checksums, and what an engine made from a model."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.settings import Settings


def cache_folder(settings: Settings) -> Path:
    """Return the cache folder: the configured one, else systemd's CacheDirectory, else the user's."""
    if settings.cache_dir is not None:
        return settings.cache_dir
    if directory := os.environ.get("CACHE_DIRECTORY"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascaline"


@contextmanager
def writing(folder: Path, needed: int) -> Iterator[None]:
    """Make a folder of the cache, and turn failures to write to it into one StorageError with the numbers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(folder).free
            raise StorageError(
                f"no space in {folder}: {free} bytes are free, {needed} are needed; "
                "make room, or set cache_dir to another disk"
            ) from error
        raise StorageError(
            f"failed to write to {folder}: {error.strerror}; set cache_dir to a folder of this user"
        ) from error
