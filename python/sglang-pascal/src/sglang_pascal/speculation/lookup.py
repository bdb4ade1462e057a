"""Prompt lookup on the host: finds the longest earlier occurrence of the end of a text; what followed it is the draft.

It needs no weights, and a few bytes of memory per token. The index holds where each run of `MIN_MATCH` tokens occurred;
candidates are compared with the text itself, so a collision of hashes costs time but never gives a wrong match.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

MIN_MATCH: Final = 3
"""Least number of tokens that must match."""
MAX_MATCH: Final = 32
"""Most tokens that are compared: a longer match is not more certain."""
MAX_INDEXED: Final = 32768
"""Most positions of one request that are indexed: the latest ones, at 8 bytes each. A power of two."""
MAX_CANDIDATES: Final = 8
"""Most earlier occurrences that are compared: the latest ones."""
_FIRST: Final = 0x9E3779B1
_SECOND: Final = 0x85EBCA77
_THIRD: Final = 0xC2B2AE3D
"""Odd numbers near 2^32 divided by irrational ones (Knuth's multiplicative hashing; the last two are xxHash's)."""
_NOWHERE: Final = 0


class Match(NamedTuple):
    """An earlier occurrence of the end of the text."""

    length: int
    """Number of equal tokens, at most `MAX_MATCH`."""
    end: int
    """Position after the earlier occurrence."""


class NgramIndex:
    """The tokens of one request, prompt and answer, and where runs of them occurred."""

    def __init__(self, expected_tokens: int = MAX_INDEXED) -> None:
        """expected_tokens: expected length of the text. It may become longer; then only its end is indexed."""
        self.tokens = array("i")
        self._capacity = min(MAX_INDEXED, 1 << max(6, (expected_tokens - 1).bit_length()))
        self._shift = 32 - (self._capacity.bit_length() - 1)
        # A position is the end of a run. The run at the beginning ends at MIN_MATCH, so 0 is none.
        self._latest = array("i", bytes(4 * self._capacity))
        self._earlier = array("i", bytes(4 * self._capacity))
        self._indexed = MIN_MATCH - 1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_bytes(self) -> int:
        """Memory of tokens and index."""
        return sum(part.itemsize * len(part) for part in (self.tokens, self._latest, self._earlier))

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; `index` makes them findable."""
        self.tokens.extend(iter(tokens))  # SGLang's are arrays of another type

    def index(self, budget: int) -> int:
        """Index the next positions that are not the last, at most budget; return their number."""
        first = max(self._indexed + 1, len(self.tokens) - self._capacity)
        end = min(len(self.tokens), first + budget)
        for position in range(first, end):
            bucket = self._bucket(position)
            self._earlier[position % self._capacity] = self._latest[bucket]
            self._latest[bucket] = position
        self._indexed = max(self._indexed, end - 1)
        return max(0, end - first)

    def match(self) -> Match | None:
        """Return the longest earlier occurrence of the end of the text, and the latest of several; None without one."""
        if len(self.tokens) <= MIN_MATCH:
            return None
        best = None
        position = self._latest[self._bucket(len(self.tokens))]
        for _ in range(MAX_CANDIDATES):
            if position <= max(_NOWHERE, self._indexed - self._capacity):
                break
            length = self._common(position)
            if length >= MIN_MATCH and (best is None or length > best.length):
                best = Match(length, position)
                if length == MAX_MATCH:
                    break
            earlier = self._earlier[position % self._capacity]
            position = earlier if earlier < position else _NOWHERE
        return best

    def following(self, match: Match, n: int) -> list[int]:
        """Return the n tokens after a match. A match near the end of the text has fewer: they are repeated."""
        period = self.tokens[match.end : match.end + n]
        return [period[i % len(period)] for i in range(n)]

    def _bucket(self, position: int) -> int:
        """Hash of the run that ends at a position."""
        first, second, third = self.tokens[position - MIN_MATCH : position]
        mixed = first * _FIRST + second * _SECOND + third * _THIRD
        return (mixed * _FIRST & 0xFFFFFFFF) >> self._shift

    def _common(self, position: int) -> int:
        """Return the number of tokens before a position that equal those at the end of the text."""
        tokens, end, length = self.tokens, len(self.tokens), 0
        while length < min(MAX_MATCH, position) and tokens[position - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length
