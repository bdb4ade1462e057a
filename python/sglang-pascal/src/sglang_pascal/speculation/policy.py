"""Chooses how many drafted tokens to check, from how often a request's drafts were right and from the cost of a row.

A step with more rows takes longer, and the tokens that it wins are only probable. The chosen width has the most
expected tokens per time among the widths for which the engine has recorded steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG_MATCH: Final = 8
"""Equal tokens from which a match counts as long: its first token is right far more often than a short match's."""
MARGIN: Final = 0.1
"""Share of tokens that a wider step must win beyond its cost: estimates are noisy, and a plain step is safe."""
_PRIOR_PER_TOKEN: Final = 0.12
_PRIOR_FIRST_MOST: Final = 0.9
_PRIOR_NEXT: Final = 0.8
_PRIOR_WEIGHT: Final = 2.0
"""Weight of the prior, in drafts: after two, a request's own record counts as much as the prior."""
_KEPT_PER_DRAFT: Final = 0.9
_SAMPLES: Final = 7
_LEAST_SAMPLES: Final = 3
"""The median is taken over the last _SAMPLES steps of a kind, once there are _LEAST_SAMPLES."""
_STEPS_UNTIL_RETRY: Final = 1024
"""Plain steps after which the cost of wider steps is measured again; its three slow steps are few beside these."""
_KEPT_PER_STEP: Final = 0.995
"""Share of a record that a step without a draft keeps: drafts are tried again once a request begins to quote."""


class Draft(NamedTuple):
    """The tokens that could be checked for one request."""

    n_tokens: int
    match_length: int
    first: float
    """Probability that the first token is right."""
    next: float
    """Probability that a further token is right, if all before it are."""

    def expected(self, n_rows: int) -> float:
        """Return the expected number of right tokens if n_rows of them are checked."""
        n = min(self.n_tokens, n_rows)
        return self.first * sum(self.next**i for i in range(n))


@dataclass
class _Record:
    right: float = 0.0
    wrong: float = 0.0

    def rate(self, prior: float) -> float:
        return (self.right + _PRIOR_WEIGHT * prior) / (self.right + self.wrong + _PRIOR_WEIGHT)

    def fade(self, kept: float) -> None:
        self.right *= kept
        self.wrong *= kept


@dataclass
class Acceptance:
    """How often the drafts of one request were right. The first token has its own record: all others depend on it."""

    _first: dict[bool, _Record] = field(default_factory=lambda: {False: _Record(), True: _Record()})
    """Records of the first token: True = after a long match."""
    _next: _Record = field(default_factory=_Record)

    def draft(self, n_tokens: int, match_length: int, others: Acceptance | None = None) -> Draft:
        """Return a draft of that many tokens after a match of that length.

        others: what a new request is expected to be like; None = what is known of no request yet.
        """
        first, further = others.draft(n_tokens, match_length)[2:] if others else _prior(match_length)
        return Draft(
            n_tokens, match_length, self._first[match_length >= LONG_MATCH].rate(first), self._next.rate(further)
        )

    def note(self, n_drafted: int, match_length: int, n_right: int) -> None:
        """Count a checked draft whose first n_right tokens were right."""
        record = self._first[match_length >= LONG_MATCH]
        record.fade(_KEPT_PER_DRAFT)
        if not n_right:
            record.wrong += 1
            return
        record.right += 1
        self._next.fade(_KEPT_PER_DRAFT)
        self._next.right += n_right - 1
        self._next.wrong += n_right < n_drafted

    def step(self) -> None:
        """Count a step without a draft."""
        for record in (*self._first.values(), self._next):
            record.fade(_KEPT_PER_STEP)


def _prior(match_length: int) -> tuple[float, float]:
    """Return how probable a draft's first token and each further one are, if nothing was checked yet."""
    return min(_PRIOR_FIRST_MOST, _PRIOR_PER_TOKEN * match_length), _PRIOR_NEXT


class Pace:
    """The time of checks as the host measures it, including its waits for the device, which count on a fast card."""

    def __init__(self, row_cost: float, draft_cost: float = 0.0) -> None:
        """row_cost, draft_cost: time of a further row, and of drafting a token, as shares of a step's time.

        They are used until there are measurements.
        """
        self._row_cost, self._draft_cost = row_cost, draft_cost
        self._ratios: dict[tuple[int, int], deque[float]] = {}
        """(requests, width) -> times of the last steps, as multiples of a plain step's time under the same load."""
        self._plain_steps = 0

    def note(self, n: int, width: int, ratio: float) -> None:
        """Count a check of n requests of that width. ratio: its time as a multiple of a plain step's."""
        self._ratios.setdefault((n, width), deque(maxlen=_SAMPLES)).append(ratio)

    def step(self, width: int) -> None:
        """Count a step. Many plain steps in a row drop the measurements, so that slow widths are tried again."""
        self._plain_steps = self._plain_steps + 1 if width == 1 else 0
        if self._plain_steps == _STEPS_UNTIL_RETRY:
            self._plain_steps = 0
            self._ratios.clear()

    def cost(self, n: int, width: int) -> float:
        """Return the time of a step of n requests of that width, as a multiple of one of width 1.

        Until there are enough samples, the assumed cost counts as one of them."""
        assumed = 1 + min(self._row_cost * n + self._draft_cost, self._measured_per_row(n)) * (width - 1)
        ratios = self._ratios.get((n, width), ())
        if len(ratios) < _LEAST_SAMPLES:
            return fmean((assumed, *ratios))
        return max(1.0, median(ratios))

    def _measured_per_row(self, n: int) -> float:
        """Return the smallest measured cost of a further row in steps of n requests; infinite without measurements."""
        found = (
            (median(ratios) - 1) / (width - 1)
            for (requests, width), ratios in self._ratios.items()
            if requests == n and len(ratios) >= _LEAST_SAMPLES
        )
        return max(0.0, min(found, default=math.inf))


def choose_width(drafts: Sequence[Draft | None], widths: Sequence[int], most_rows: int, pace: Pace) -> int:
    """Return the rows per request of the next step; 1 = check nothing.

    drafts: one per request, None = no draft. widths: the allowed ones. most_rows: most rows of all requests together.
    """
    n = len(drafts)

    def tokens_per_time(width: int) -> float:
        won = sum(draft.expected(width - 1) for draft in drafts if draft is not None)
        return (n + won) / pace.cost(n, width)

    allowed = [width for width in widths if width > 1 and n * width <= most_rows]
    best = max(allowed, key=tokens_per_time, default=1)
    return best if best > 1 and tokens_per_time(best) > n * (1 + MARGIN) else 1
