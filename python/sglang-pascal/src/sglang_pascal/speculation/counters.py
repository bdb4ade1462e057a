"""Counters of speculation on SGLang's metrics page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

DRAFTED: Final = "sglang_pascal:spec_drafted_tokens_total"
ACCEPTED: Final = "sglang_pascal:spec_accepted_tokens_total"
STEPS: Final = "sglang_pascal:spec_steps_total"


class Counters:
    """Tokens drafted and accepted, and steps by the rows that each request had."""

    def __init__(self) -> None:
        from prometheus_client import Counter  # SGLang first names the folder that its processes share

        self._drafted = Counter(DRAFTED, "Drafted tokens that were checked")
        self._accepted = Counter(ACCEPTED, "Drafted tokens that were right")
        self._steps = Counter(STEPS, "Decode steps by rows per request; 1 = nothing was checked", ["width"])

    def step(self, width: int, n_drafts: Sequence[int]) -> None:
        """Count a step of `width` rows per request; n_drafts: drafted tokens of each request."""
        self._steps.labels(width=str(width)).inc()
        self._drafted.inc(sum(n_drafts))

    def right(self, n_tokens: int) -> None:
        """Count drafted tokens that were right."""
        self._accepted.inc(n_tokens)
