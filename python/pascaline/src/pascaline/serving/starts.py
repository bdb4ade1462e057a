"""How often an instance was started since it last served for a while: kept over the restarts of its unit.

A service manager starts an instance again that failed. Each start knows nothing of those before it, and what watches
from outside sees it come and go; so the instance itself counts, in the folder that systemd keeps ($STATE_DIRECTORY).
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
"""A count beyond this was not written by us."""


@dataclass(frozen=True, slots=True)
class Starts:
    """The count of one instance."""

    path: Path | None
    """Its file; None where nobody keeps a folder for it: then only this start is known."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Starts:
        """Use the first folder of $STATE_DIRECTORY."""
        folder = environment.get("STATE_DIRECTORY", "").partition(":")[0]
        return cls(Path(folder, FILE_NAME) if folder else None)

    def count(self) -> int:
        """Return how many starts there were since the instance last served for a while; 0 where that is not known."""
        try:
            found = json.loads(self.path.read_text())["starts"] if self.path else 0
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return 0
        return found if type(found) is int and 0 <= found <= MOST else 0

    def begin(self) -> int:
        """Count this start and return the sum. Raises OSError where it can not be kept."""
        starts = self.count() + 1
        self._write(starts)
        return starts

    def settle(self) -> None:
        """Begin anew: the instance serves, or was stopped in order. Raises OSError where that can not be kept."""
        self._write(0)

    def _write(self, starts: int) -> None:
        if self.path is None:
            return
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps({"starts": starts}))
        fresh.replace(self.path)
