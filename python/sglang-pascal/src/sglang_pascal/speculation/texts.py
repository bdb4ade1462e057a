"""What the host knows about each running request's text, although the device is a step ahead.

With overlapping steps, SGLang launches a step before it has processed the result of the one before: the newest tokens
are on the device only. After a step that checked nothing, exactly one token is missing. The host looks for a draft
without that token and waits for the device only if it finds one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.speculation.lookup import MIN_MATCH, NgramIndex
from sglang_pascal.speculation.policy import Acceptance, Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

GUESSED_MATCH: Final = 6
"""Length of a match whose first token is right about as often as a draft model's: seven times out of ten."""
INDEXED_PER_STEP: Final = 1024
"""Most positions of all requests together that are indexed in one step: about a millisecond of the host's time."""
INDEXED_PER_PROMPT: Final = 8192
"""The same while the device computes prompts, which takes longer per token."""


@dataclass
class Text:
    """The text of one request."""

    index: NgramIndex
    total: int | None
    """Number of tokens, including those that only the device knows; None after a check with an unknown outcome."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    guesses: Acceptance = field(default_factory=Acceptance)
    """Of all requests together, for which a model drafts: a bad one is not tried anew by each request."""
    checked: Draft | None = None
    """The draft that the last step checked, until its outcome is noted."""
    before_check: int = 0
    """Number of tokens when it was checked."""
    n_right: int = 0
    """Drafted tokens of the last step that were right; 0 while that is unknown."""

    @property
    def missing(self) -> int | None:
        """Number of tokens that only the device knows; None = unknown."""
        if self.total is None or not 0 <= self.total - len(self.index) <= 1:
            return None
        return self.total - len(self.index)

    def learn(self, total: int, newest: Sequence[int]) -> None:
        """Take over the true number of tokens and the last tokens from the device."""
        missing = total - len(self.index)
        if missing > 0:
            self.index.extend(newest[len(newest) - missing :])
        self.settle(total)

    def settle(self, total: int) -> None:
        """Take over the true number of tokens; note the outcome of the last check, which follows from it."""
        self.total = total
        if self.checked is not None:
            self.n_right = max(0, total - self.before_check - 1)
            for record in (self.acceptance, self.guesses):
                record.note(self.checked.n_tokens, self.checked.match_length, self.n_right)
            self.checked = None

    def draft(self, most: int) -> tuple[Draft, list[int]] | None:
        """Return up to `most` tokens that may follow; None if the end of the text did not occur before.

        If the newest token is missing, this assumes that it is the one that followed before. That is good enough to
        decide whether to wait for it.
        """
        if most < 1 or (match := self.index.match()) is None:
            return None
        behind = self.missing or 0
        tokens = self.index.following(match, most + behind)[behind:]
        return self.acceptance.draft(most, match.length + behind), tokens

    def guess(self, most: int) -> tuple[Draft, list[int]] | None:
        """Return a draft of `most` tokens that a model is still to write; None if `most` is 0 or less."""
        return (self.acceptance.draft(most, GUESSED_MATCH, self.guesses), []) if most > 0 else None

    def launched(self, width: int, checked: Draft | None) -> None:
        """Note that a step of that width started. The number of tokens must be known."""
        assert self.total is not None
        self.n_right = 0
        if width == 1 or checked is None:
            self.acceptance.step()
            self.total += 1
        else:
            self.checked, self.before_check, self.total = checked, self.total, None


class Texts:
    """The texts of all running requests, by SGLang's request id."""

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length
        self._texts: dict[str, Text] = {}
        self._guesses = Acceptance()

    def clear(self) -> None:
        """Forget all."""
        self._texts.clear()

    def expected_guess(self, n_tokens: int) -> Draft:
        """Return a draft of `n_tokens` tokens by a model for a new request, with the probabilities seen in others."""
        return self._guesses.draft(n_tokens, GUESSED_MATCH)

    def prefilled(self, requests: Sequence[Any]) -> None:
        """Note that a step computes these requests' prompts; each gets one token if its prompt ends there."""
        for request in requests:
            known = len(request.origin_input_ids_unpadded) + len(request.output_ids)
            text = self._texts.get(request.rid)
            if text is None or len(text.index) > known:  # new; or retracted, so that a step's tokens were dropped
                text = self._texts[request.rid] = self._new(request)
            text.checked, text.total, text.n_right = None, known + 1, 0
            _extend(text, request)
        self._index(INDEXED_PER_PROMPT)

    def running(self, requests: Sequence[Any]) -> list[Text]:
        """Return the texts of a batch with what SGLang has processed; requests that left are forgotten."""
        self._texts = {request.rid: self._updated(request) for request in requests}
        self._index(INDEXED_PER_STEP)
        return list(self._texts.values())

    def _index(self, budget: int) -> None:
        for text in self._texts.values():
            budget -= text.index.index(budget)

    def advanced(self, requests: Sequence[Any]) -> None:
        """Note a step that checks nothing, without reading the texts; requests that left are forgotten."""
        if len(self._texts) > len(requests):
            running = {request.rid for request in requests}
            self._texts = {rid: text for rid, text in self._texts.items() if rid in running}
        for request in requests:
            text = self._texts.get(request.rid)
            if text is not None and text.total is not None:
                text.total += 1
                text.n_right = 0

    def _new(self, request: Any) -> Text:
        answer = request.sampling_params.max_new_tokens or self._context_length
        index = NgramIndex(min(self._context_length, len(request.origin_input_ids_unpadded) + answer))
        return Text(index, None, guesses=self._guesses)

    def _updated(self, request: Any) -> Text:
        text = self._texts.get(request.rid) or self._new(request)
        _extend(text, request)
        processed = len(request.origin_input_ids_unpadded) + len(request.output_ids)
        if text.total is None and text.checked is not None and processed > text.before_check:
            text.settle(processed)
        return text


def _extend(text: Text, request: Any) -> None:
    """Append what SGLang has processed of a request."""
    prompt, output = request.origin_input_ids_unpadded, request.output_ids
    known = len(text.index)
    if known < len(prompt):
        text.index.extend(prompt[known:])
    text.index.extend(output[max(0, known - len(prompt)) :])


def most_drafts(request: Any, text: Text, width: int) -> int:
    """Return how many tokens may be drafted for a request: 0 with penalties, which depend on each token before.

    A step gives one token more than the drafts it accepts, so the last token of an answer is never drafted.
    """
    parameters = request.sampling_params
    has_penalties = (
        parameters.frequency_penalty
        or parameters.presence_penalty
        or parameters.repetition_penalty != 1.0
        or parameters.min_new_tokens
    )
    if has_penalties or len(text.index) <= MIN_MATCH:
        return 0
    if parameters.max_new_tokens is None:
        return width - 1
    answered = len(text.index) + (text.missing or 0) - len(request.origin_input_ids_unpadded)
    return int(min(width - 1, parameters.max_new_tokens - answered - 1))
