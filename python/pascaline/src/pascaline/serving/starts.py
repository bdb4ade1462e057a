"""Counts the starts of an instance since it last served for a while; the count survives restarts of its unit.

A service manager restarts an instance that failed. A process knows nothing about earlier ones, and monitoring only sees
the instance come and go. So the instance keeps the count in the folder that systemd preserves ($STATE_DIRECTORY).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_NAME = "starts.json"
MOST = 1_000_000
"""Largest valid count; a larger one in the file is damage."""


@dataclass(frozen=True, slots=True)
class Starts:
    """The count of one instance."""

    path: Path | None
    """Its file; None if there is no state folder: then only this start is counted."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Starts:
        """Use the first folder of $STATE_DIRECTORY."""
        folder = environment.get("STATE_DIRECTORY", "").partition(":")[0]
        return cls(Path(folder, FILE_NAME) if folder else None)

    def count(self) -> int:
        """Return the number of starts since the instance last served for a while; 0 if it is unknown."""
        try:
            found = json.loads(self.path.read_text())["starts"] if self.path else 0
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return 0
        return found if type(found) is int and 0 <= found <= MOST else 0

    def begin(self) -> int:
        """Count this start and return the new count. Raises OSError if it cannot be written."""
        starts = self.count() + 1
        self._write(starts)
        return starts

    def settle(self) -> None:
        """Reset the count: the instance serves, or was stopped in order. Raises OSError if it cannot be written."""
        self._write(0)

    def _write(self, starts: int) -> None:
        if self.path is None:
            return
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({"starts": starts}))
        fresh.replace(self.path)
