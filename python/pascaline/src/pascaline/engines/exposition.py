"""Reads a few series from a page in Prometheus' text format; a malformed line of theirs invalidates the page.

This is our own parser because the page is read every second, and a full parser takes a hundred times as long. Lines of
other series are skipped. Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

LARGEST = 2.0**53
"""Largest valid value of a counter or gauge; beyond it a float64 cannot represent every integer."""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SAMPLE = re.compile(r'[^\s{]+(?P<labels>\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(?P<value>\S+)(?:[ \t]+-?\d+)?[ \t]*')
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


class MalformedPageError(ValueError):
    """A malformed line, an impossible value, a series that occurs twice, or a page that ends within a line."""


class Samples:
    """The samples of the chosen series."""

    def __init__(self, page: str, names: Collection[str]) -> None:
        """Read the series with these names from a page. Raises MalformedPageError."""
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
        """Return the sum of a name's series whose labels contain `label`, such as `mode="decode"`; None if none do."""
        values = [value for labels, value in self._samples.get(name, {}).items() if label in labels]
        return sum(values) if values else None

    def total(self, *names: str) -> float:
        """Return the sum over several names. An absent one is 0: a labelled series is absent before its first use."""
        return sum(self.sum(name) or 0.0 for name in names)


def _value(text: str, line: str) -> float:
    # A ratio is NaN before there is anything to divide: no work so far, and no error.
    if text == "NaN":
        return 0.0
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    if not 0 <= value <= LARGEST:
        raise MalformedPageError(f"not a count: {line[:120]!r}")
    return value
