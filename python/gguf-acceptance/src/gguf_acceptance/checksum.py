"""One checksum for a model of one or several files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def combined_sha256(digests: Sequence[str]) -> str:
    """Return a single file's own sha256; otherwise the sha256 of all digests in file order, one a line.

    digests: hexadecimal, in lower case.
    """
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
