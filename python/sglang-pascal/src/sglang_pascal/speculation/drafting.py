"""What the next step checks: drafts of each request, and how many rows all of them get. Pure, but for one question.

The host waits for the device only if that can pay: after a check, whose outcome it does not know, and if the text
before the newest token has occurred before. Text that never repeats is decoded without a wait.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_pascal.speculation.policy import Draft, Pace, choose_width
from sglang_pascal.speculation.texts import Text, Texts, most_drafts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Widths = Callable[[int], Sequence[int]]
    """Number of requests -> the rows that each may have in a step."""
    Wait = Callable[[], Sequence[tuple[int, Sequence[int]]]]
    """Waits for the device; returns each request's number of tokens, and those of the last step."""
    Found = tuple[Draft | None, list[int]]
    """A draft of a request and its tokens."""


@dataclass(frozen=True)
class Step:
    """What one step computes."""

    width: int
    """Rows of each request: a decided token, and drafts."""
    n_drafts: list[int]
    """Of each request; its other rows are padding."""
    drafts: list[list[int]]
    """`[n][width - 1]`, padded."""


class Drafter:
    """Plans the steps of a model's running requests."""

    def __init__(
        self,
        *,
        widths: Widths,
        most_rows: int,
        row_cost: float,
        context_length: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """most_rows, row_cost: as `choose_width` and `Pace` take them. context_length: most tokens of a request."""
        self._widths, self._most_rows, self._pace = widths, most_rows, Pace(row_cost)
        self._clock = clock
        self._launched: tuple[float, int, int] | None = None
        """When the last step was launched, its requests and its width; None after a prompt."""
        self._context_length = context_length
        self._texts = Texts(context_length)

    def clear(self) -> None:
        """Forget the running requests."""
        self._texts.clear()

    def prefilled(self, requests: Sequence[Any]) -> None:
        """Note that a step computes these requests' prompts."""
        self._texts.prefilled(requests)
        self._launched = None

    def plan(self, requests: Sequence[Any], wait: Wait) -> Step:
        """Return the next step of a batch; it counts as launched."""
        texts = self._texts.running(requests)
        if any(text.missing is None for text in texts):
            _learn(texts, wait())
        found, width = self._choose(requests, texts)
        if width > 1 and any(text.missing for text in texts):
            _learn(texts, wait())
            found, width = self._choose(requests, texts)
        self._measure(len(texts), width)
        return _launched(texts, found, width)

    def _measure(self, n: int, width: int) -> None:
        """Note how long the last step took: until this one is launched."""
        now = self._clock()
        if self._launched is not None:
            then, last_n, last_width = self._launched
            self._pace.note(last_n, last_width, now - then)
        self._launched = (now, n, width)

    def _choose(self, requests: Sequence[Any], texts: Sequence[Text]) -> tuple[list[Found], int]:
        """Return each request's draft, and the width. No row may be beyond the context: there are no angles for it."""
        if 2 * len(texts) > self._most_rows:
            return [(None, [])] * len(texts), 1
        longest = max(text.total or 0 for text in texts)
        widths = [width for width in self._widths(len(texts)) if longest + width - 1 <= self._context_length]
        found: list[Found] = [
            text.draft(most_drafts(request, text, max(widths, default=1))) or (None, [])
            for request, text in zip(requests, texts, strict=True)
        ]
        return found, choose_width([draft for draft, _ in found], widths, self._most_rows, self._pace)


def _learn(texts: Sequence[Text], facts: Sequence[tuple[int, Sequence[int]]]) -> None:
    for text, (total, newest) in zip(texts, facts, strict=True):
        text.learn(total, newest)


def _launched(texts: Sequence[Text], found: Sequence[Found], width: int) -> Step:
    checked = [draft and draft._replace(n_tokens=min(draft.n_tokens, width - 1)) for draft, _ in found]
    for text, draft in zip(texts, checked, strict=True):
        text.launched(width, draft)
    n_drafts = [draft.n_tokens if draft else 0 for draft in checked]
    return Step(width, n_drafts, [[*tokens, *[0] * width][: width - 1] for _, tokens in found])
