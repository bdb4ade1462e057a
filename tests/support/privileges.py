"""Commands without root's right to read and write every file, for tests that root runs too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def ordinary(command: Sequence[str]) -> list[str]:
    """Return a command whose process obeys the permissions of files: for root by giving up two capabilities."""
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
