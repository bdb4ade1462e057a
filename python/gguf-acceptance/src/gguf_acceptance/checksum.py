"""The sha256 of a file, and one for a model of one or several files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CHUNK_BYTES = 1 << 20
"""Read at a time."""


def file_sha256(path: Path, on_bytes: Callable[[int, int], None] | None = None) -> str:
    """Return the sha256 of a file, in hexadecimal. on_bytes: called with (bytes read, bytes of the file)."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if on_bytes is not None:
                on_bytes(done, total)
    return digest.hexdigest()


def combined_sha256(digests: Sequence[str]) -> str:
    """Return a single file's own sha256; otherwise the sha256 of all digests in file order, one a line.

    digests: hexadecimal, in lower case.
    """
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
