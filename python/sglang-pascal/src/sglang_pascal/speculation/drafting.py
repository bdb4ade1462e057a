"""Plans the next step: each request's drafts, and the rows that each request gets. Pure, except for one callback that
waits for the device.

The host waits for the device only if a wait can pay: after a check, because its outcome is unknown, and if the text
before the newest token has occurred earlier. Text that never repeats is decoded without a wait. If lookup does not
win (`account`), no draft is looked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_pascal.speculation.account import Accounts
from sglang_pascal.speculation.policy import Draft, choose_width
from sglang_pascal.speculation.texts import Text, Texts, most_drafts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Widths = Callable[[int], Sequence[int]]
    """Number of requests -> the rows that each may have in a step."""
    Wait = Callable[[], Sequence[tuple[int, Sequence[int]]]]
    """Waits for the device; returns each request's number of tokens, and its tokens of the last step."""
    Found = tuple[Draft | None, list[int]]
    """A request's draft and its tokens; no tokens if a model is still to draft them."""
    Search = Callable[[Text, int], tuple[Draft, list[int]] | None]
    """Text, most tokens -> what may be drafted; None = nothing."""


@dataclass(frozen=True)
class Step:
    """What one step computes."""

    width: int
    """Rows of each request: its newest token, and drafts."""
    n_drafts: list[int]
    """Number of drafts of each request; its other rows are padding."""
    drafts: list[list[int]]
    """`[n][width - 1]`, padded; all padding if a model drafts them."""
    texts: list[Text] = field(default_factory=list)
    """Each request's text with its newest token; empty if nothing is drafted."""


@dataclass(frozen=True)
class _Launch:
    """The step before."""

    at: float
    requests: list[str]
    width: int


class Drafter:
    """Plans the steps of a model's running requests."""

    def __init__(
        self,
        *,
        widths: Widths,
        most_rows: int,
        row_cost: float,
        context_length: int,
        draft_cost: float = 0.0,
        search: Search = Text.draft,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """most_rows, row_cost, draft_cost: see `choose_width` and `Pace`.

        context_length: most tokens of a request. search: finds what may be drafted for a text.
        """
        self._widths, self._most_rows, self._accounts = widths, most_rows, Accounts(row_cost, draft_cost)
        self._search = search
        self._clock = clock
        self._launched: _Launch | None = None
        """None after a prompt."""
        self._context_length = context_length
        self._texts = Texts(context_length)
        self._running: dict[str, Any] = {}
        """SGLang's requests of the last step and of prompts since, by id."""
        self._waited = False
        self._prepared = False
        self._is_after_prompt = True
        """Whether the time until the next launch is a prompt's: SGLang waits for its result after the first launch."""

    @property
    def won_seconds(self) -> float:
        """What speculation has won so far, seconds; negative if it has lost."""
        return self._accounts.won_seconds

    @property
    def has_hope(self) -> bool:
        """Whether a model's drafts may win with as many requests as run now, as far as is known."""
        n = sum(not request.finished() for request in self._running.values())
        if not n or 2 * n > self._most_rows or not self._accounts.has_hope(n):
            return False
        widths = self._widths(n)
        guesses = [self._texts.expected_guess(max(widths) - 1)] * n
        return choose_width(guesses, widths, self._most_rows, self._accounts.pace) > 1

    def prepared(self) -> None:
        """Note that the planned step begins with computing what a draft model lacks."""
        self._prepared = True

    def clear(self) -> None:
        """Forget the running requests."""
        self._texts.clear()

    def prefilled(self, requests: Sequence[Any]) -> None:
        """Note that a step computes these requests' prompts."""
        self._texts.prefilled(requests)
        self._accounts.prompted()
        self._running |= {request.rid: request for request in requests}
        self._launched = None
        self._is_after_prompt = True

    def plan(self, requests: Sequence[Any], wait: Wait) -> Step:
        """Return the next step of a batch, and count it as launched."""
        self._waited = False
        self._running = {request.rid: request for request in requests}
        looks = self._looks(len(requests))
        texts: list[Text] = []
        if looks or self._after_check:
            texts = self._texts.running(requests)
            if any(text.missing is None for text in texts):
                self._learn(texts, wait)
        n_right = sum(text.n_right for text in texts) if self._after_check else 0
        step = self._looked_up(requests, texts, wait) if looks else self._plain(requests)
        self._measure(requests, step.width, n_right, looks)
        return step

    @property
    def _after_check(self) -> bool:
        return self._launched is not None and self._launched.width > 1

    def _looks(self, n: int) -> bool:
        """Return whether drafts are looked for. The time of the first step after a prompt is the prompt's."""
        return self._launched is not None and 2 * n <= self._most_rows and self._accounts.allows(n)

    def _plain(self, requests: Sequence[Any]) -> Step:
        """Return a step without drafts; this costs the host almost no time."""
        self._texts.advanced(requests)
        return Step(1, [0] * len(requests), [[] for _ in requests])

    def _looked_up(self, requests: Sequence[Any], texts: list[Text], wait: Wait) -> Step:
        found, width = self._choose(requests, texts)
        if width > 1 and any(text.missing for text in texts):
            self._learn(texts, wait)
            found, width = self._choose(requests, texts)
        return _launched(texts, found, width)

    def _learn(self, texts: Sequence[Text], wait: Wait) -> None:
        """Learn the newest tokens from the device; this waits for it."""
        self._waited = True
        for text, (total, newest) in zip(texts, wait(), strict=True):
            text.learn(total, newest)

    def _measure(self, requests: Sequence[Any], width: int, n_right: int, looked: bool) -> None:
        """Note the time of the last step, up to the launch of this one, if both have the same requests."""
        now, last = self._clock(), self._launched
        launch = self._launched = _Launch(now, [request.rid for request in requests], width)
        n = len(launch.requests)
        is_step = last is not None and last.requests == launch.requests and not self._is_after_prompt
        self._is_after_prompt = self._is_after_prompt and last is None
        if last is not None and is_step and 2 * n <= self._most_rows:
            self._accounts.note(
                n, last.width, now - last.at, n_right, looked=looked, waited=self._waited, prepared=self._prepared
            )
        self._prepared = False

    def _choose(self, requests: Sequence[Any], texts: Sequence[Text]) -> tuple[list[Found], int]:
        """Return each request's draft, and the width. No row may be beyond the context: there are no rotary angles."""
        longest = max(text.total or 0 for text in texts)
        widths = [width for width in self._widths(len(texts)) if longest + width - 1 <= self._context_length]
        found: list[Found] = [
            self._search(text, most_drafts(request, text, max(widths, default=1))) or (None, [])
            for request, text in zip(requests, texts, strict=True)
        ]
        return found, choose_width([draft for draft, _ in found], widths, self._most_rows, self._accounts.pace)


def _launched(texts: Sequence[Text], found: Sequence[Found], width: int) -> Step:
    checked = [draft and draft._replace(n_tokens=min(draft.n_tokens, width - 1)) for draft, _ in found]
    for text, draft in zip(texts, checked, strict=True):
        text.launched(width, draft)
    if width == 1:
        texts[0].guesses.step()  # the same for all texts
    n_drafts = [draft.n_tokens if draft else 0 for draft in checked]
    return Step(width, n_drafts, [[*tokens, *[0] * width][: width - 1] for _, tokens in found], list(texts))
