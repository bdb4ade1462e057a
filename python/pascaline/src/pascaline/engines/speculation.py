"""Speculation: what an engine drafts in each step, decided from the settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Speculation:
    """How an engine drafts tokens. A step of a request verifies its drafts in rows beside that of its newest token."""

    method: str
    """none, lookup, draft, eagle3 or mtp: never auto."""
    tokens: int = 0
    """Most tokens drafted for a request in one step; 0 if the method is none."""
    rows: int = 0
    """Most rows of one step, all requests together; 0 = no limit that the plan knows."""
    draft: ModelSpec | None = field(default=None, repr=False)
    """The model or the heads that draft, if they are in a file of their own."""
    draft_dir: Path | None = field(default=None, repr=False)
    """Folder that the engine starts from instead of that file."""

    @property
    def width(self) -> int:
        """Most rows of one request."""
        return self.tokens + 1

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        draft = None if self.draft is None else self.draft.name or self.draft.architecture
        return {"method": self.method, "tokens": self.tokens, "rows": self.rows, "draft": draft}


NO_SPECULATION: Final = Speculation("none")
