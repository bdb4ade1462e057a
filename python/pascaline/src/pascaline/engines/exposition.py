"""A page of Prometheus' text format, read for a few series; anything malformed makes the whole page no answer.

Written out because the page is read every second and a full parser takes a hundred times as long. Lines of other series
are not looked at. Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

LARGEST = 2.0**53
"""A counter or gauge of an engine; beyond it a float64 does not tell one from the next."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SAMPLE = re.compile(r'[^\s{]+(?P<labels>\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(?P<value>\S+)(?:[ \t]+-?\d+)?[ \t]*')
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class MalformedPageError(ValueError):
    """A line that is none, a value that no engine can count, the same series twice, or a page that ends in a line."""


class Samples:
    """The samples of some series."""

    def __init__(self, page: str, names: Collection[str]) -> None:
        """Read them. Raises MalformedPageError."""
        self._samples: dict[str, dict[str, float]] = {}
        if page and not page.endswith("\n"):
            raise MalformedPageError(f"the page ends within a line: {page[-60:]!r}")
        for line in page.split("\n"):
            found = _NAME.match(line)
            if found and found[0] in names:
                self._add(found[0], line)

    def _add(self, name: str, line: str) -> None:
        sample = _SAMPLE.fullmatch(line)
        if sample is None:
            raise MalformedPageError(f"not a sample: {line[:120]!r}")
        series, labels = self._samples.setdefault(name, {}), sample["labels"] or ""
        if labels in series:
            raise MalformedPageError(f"twice in one page: {line[:120]!r}")
        series[labels] = _value(sample["value"], line)

    def sum(self, name: str, label: str = "") -> float | None:
        """Return the sum of all series of a name whose labels hold a text (as `mode="decode"`); None: there is none."""
        values = [value for labels, value in self._samples.get(name, {}).items() if label in labels]
        return sum(values) if values else None

    def total(self, *names: str) -> float:
        """Return the sum over several names; one that is absent counts 0, as a label's series before its first use."""
        return sum(self.sum(name) or 0.0 for name in names)


def _value(text: str, line: str) -> float:
    # A ratio before there is anything to divide: no work, and no mistake.
    if text == "NaN":
        return 0.0
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    if not 0 <= value <= LARGEST:
        raise MalformedPageError(f"not a count: {line[:120]!r}")
    return value
