"""The header of one model as plain data, and the result of the checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that is present but too large to be read for a check."""

    kind: str
    """`string` or `array`."""
    count: int = 1
    """Elements of an array."""
    element: str | None = None
    """GGUF's name of the type of an array's elements."""

    def __len__(self) -> int:
        return self.count


class Tensor(NamedTuple):
    """One tensor as the header describes it."""

    tensor_type: str
    """GGML's name, such as `Q4_K`."""
    shape: tuple[int, ...]
    """Outermost dimension first."""


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata and tensors of one model, of all of its parts together."""

    metadata: Mapping[str, Any]
    """Every key; arrays as lists, or Unread."""
    tensors: Mapping[str, Tensor]

    def text(self, key: str) -> str | None:
        """A string; None if it is absent, unread, or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> float | None:
        """A finite number; None if it is absent or of another type."""
        value = self.metadata.get(key)
        return value if is_number(value) else None


@dataclass(slots=True)
class Verdict:
    """What the checks found."""

    refusals: list[str] = field(default_factory=list)
    """Why the model is not served, one sentence each, the most informative first; empty if it is served."""
    defaults: list[str] = field(default_factory=list)
    """Values missing in the file for which llama.cpp's loader has a default: `rope.freq_base 10000`."""

    def refuse(self, sentence: str) -> None:
        """Note a reason to refuse the model."""
        self.refusals.append(sentence)

    def default(self, key: str, value: object) -> None:
        """Note a default that is used."""
        self.defaults.append(f"{key} {value}")

    @property
    def notes(self) -> list[str]:
        """Notes about a model that is served."""
        if not self.defaults:
            return []
        return [f"the file does not say, so llama.cpp's defaults are taken: {', '.join(self.defaults)}"]

    @property
    def sentence(self) -> str:
        """All reasons in one line; empty without a reason."""
        if len(self.refusals) <= SHOWN:
            return "; ".join(self.refusals)
        return f"{'; '.join(self.refusals[:SHOWN])}; and {len(self.refusals) - SHOWN} more"


SHOWN = 3
"""Reasons in one line."""


def is_int(value: object) -> bool:
    """Whether it is a whole number of any width."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def quoted(name: str) -> str:
    """A name from a file as messages show it: escaped, and cut if it is long."""
    shown = name if len(name) <= 80 else name[:80] + "..."
    return '"' + ascii(shown)[1:-1] + '"'
