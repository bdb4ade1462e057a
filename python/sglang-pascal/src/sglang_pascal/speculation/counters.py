"""Counters of speculation on SGLang's metrics page."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

DRAFTED: Final = "sglang_pascal:spec_drafted_tokens_total"
ACCEPTED: Final = "sglang_pascal:spec_accepted_tokens_total"
CHECKS: Final = "sglang_pascal:spec_checks_total"
STEPS: Final = "sglang_pascal:spec_steps_total"
WON: Final = "sglang_pascal:spec_won_seconds"
KINDS: Final = ("greedy", "sampled", "grammar")
_RESULTS_BEHIND: Final = 4
"""Most steps whose results SGLang may not have processed yet; with overlapping steps it is one."""


def kind_of(request: Any) -> str:
    """Return the kind of a request, one of `KINDS`: it decides how often drafts can be right."""
    if request.grammar is not None:
        return "grammar"
    return "greedy" if request.sampling_params.top_k == 1 else "sampled"  # SGLang's form of a temperature of 0


class Counters:
    """Tokens drafted and accepted by kind of request, steps by the rows that each request had, and the time won."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge  # SGLang first names the folder that its processes share

        self._drafted = Counter(DRAFTED, "Drafted tokens that were checked", ["kind"])
        self._accepted = Counter(ACCEPTED, "Drafted tokens that were right", ["kind"])
        self._checks = Counter(CHECKS, "Checks of one request's drafts in one step", ["kind"])
        self._steps = Counter(STEPS, "Decode steps by rows per request; 1 = nothing was checked", ["width"])
        self._won = Gauge(WON, "Time that was won, less what was lost", multiprocess_mode="mostrecent")
        self._launched: deque[list[str]] = deque(maxlen=_RESULTS_BEHIND)
        """The kinds of the requests of each step whose result is not known yet."""
        for kind in KINDS:
            for counter in (self._drafted, self._accepted, self._checks):
                counter.labels(kind=kind)

    def step(self, requests: Sequence[Any], width: int, n_drafts: Sequence[int]) -> None:
        """Count a step of `width` rows per request; n_drafts: drafted tokens of each request."""
        self._steps.labels(width=str(width)).inc()
        if width == 1:
            self._launched.append([])
            return
        kinds = [kind_of(request) for request in requests]
        self._launched.append(kinds)
        for kind, n in zip(kinds, n_drafts, strict=True):
            if n:
                self._drafted.labels(kind=kind).inc(n)
                self._checks.labels(kind=kind).inc()

    def right(self, n_tokens: Sequence[int], won_seconds: float) -> None:
        """Count each request's drafted tokens that were right in the oldest step whose result was not known."""
        kinds = self._launched.popleft() if self._launched else []
        if not kinds:
            return
        self._won.set(won_seconds)
        for kind, n in zip(kinds, n_tokens, strict=False):
            self._accepted.labels(kind=kind).inc(n)
