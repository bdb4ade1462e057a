"""Everything that the supervisor asks a running engine, each as one bounded exchange with the engine's own socket.

Every method blocks, so the supervisor calls it in a thread. Whatever a faulty engine sends, a method returns an answer
or False, or raises OSError.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pascaline.engines import Vitals
from pascaline.engines.client import json_object, request, stream
from pascaline.redaction import excerpt
from pascaline.serving.listener import EngineListener, ForeignListenerError
from pascaline.serving.threads import is_own_failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.engines import Engine, Progress, Task
    from pascaline.engines.client import Exchange
    from pascaline.settings import Role

POLL_TIMEOUT_SECONDS = 5.0
FIRST_GENERATION_SECONDS = 60.0
"""Timeout of a test generation while the engine warms up; if one fails, another is sent."""
BUSY_STATUSES = frozenset({429, 503})
"""HTTP statuses of an engine that refuses a request because others wait."""
QUOTED_CHARACTERS = 200
"""Most characters that a reason quotes from an answer without a token."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True)
class Probe:
    """One test generation."""

    at: float
    """Unix time."""
    ok: bool
    seconds: float
    reason: str | None
    status: int | None = None
    """HTTP status; None: there was no answer."""
    error: OSError | None = None
    """Why there was no answer; None: there was one."""

    @property
    def is_error(self) -> bool:
        """Whether the engine answered without a token for another reason than being busy."""
        return not self.ok and self.status is not None and self.status not in BUSY_STATUSES

    @property
    def lack(self) -> OSError | None:
        """Why the engine was not asked: what this process or host lacks; None: it was."""
        return self.error if self.error is not None and is_own_failure(self.error) else None


class EngineApi:
    """The API of one run of an engine."""

    def __init__(self, engine: Engine, task: Task, leader: int) -> None:
        """leader: process id of the engine, which is the leader of its session."""
        self.foreign: str | None = None
        """The other program that had the engine's port at the last request; None: the engine had it, or nobody."""
        self.vitals = Vitals()
        """What its last page of metrics says for people."""
        self._engine = engine
        self._task = task
        self._listener = EngineListener(*task.address, leader)

    def ask(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = POLL_TIMEOUT_SECONDS
    ) -> tuple[int, bytes]:
        """Send a request; return (HTTP status, body). timeout: seconds. Raises OSError."""
        task, self.foreign = self._task, None
        try:
            return request(
                task.address, path, body=body, api_key=task.api_key, timeout=timeout, listener=self._listener
            )
        except ForeignListenerError as error:
            self.foreign = str(error)
            raise

    def stream(self, path: str, body: dict[str, Any], headers: dict[str, str], timeout: float) -> Exchange:
        """Send a request with these headers and read its answer while it comes. timeout: seconds for the whole answer.

        Raises OSError.
        """
        return stream(self._task.address, path, body=body, headers=headers, timeout=timeout, listener=self._listener)

    def is_loaded(self) -> bool:
        """Whether it has loaded its model. Raises OSError if this process or host lacks the resources to ask."""
        try:
            return self.ask("/v1/models")[0] == 200
        except OSError as error:
            if is_own_failure(error):
                raise
            return False

    def version(self) -> str:
        """Return the version that it reports. Raises OSError if it reports none."""
        return self._engine.version(self.ask)

    def progress(self) -> Progress | None:
        """Return its counters; None if its page lacks them or is malformed. Raises OSError if it does not answer."""
        page = self.metrics_page()
        self.vitals = self._engine.vitals(page)
        found = self._engine.progress(page)
        if found is not None and self._task.settings.role != "generate":
            # An engine that counts answers counts those of its tokens.
            return replace(found, answers=None)
        return found

    def allocated(self) -> dict[str, int]:
        """Return the memory that it reports as allocated, as `Engine.allocated`. Raises OSError."""
        return self._engine.allocated(self.metrics_page())

    def metrics_page(self) -> str:
        """Return its /metrics. Raises OSError."""
        status, page = self.ask("/metrics")
        if status != 200:
            raise ConnectionError(f"/metrics: status {status}")
        return page.decode(errors="replace")

    def generate(self, timeout: float = FIRST_GENERATION_SECONDS) -> Probe:
        """Send the smallest request of the model's role, through the same API as users' requests. timeout: seconds.

        Generate one token, embed one word, or rank one document.
        """
        trial = TRIALS[self._task.settings.role]
        body = {"model": self._task.model.served_name, **trial.body}
        start = time.monotonic()
        status, reason, cause = None, None, None
        try:
            status, answer = self.ask(trial.path, body, timeout)
            if status != 200:
                reason = f"status {status}: {_quoted(answer)}"
            elif not trial.succeeded(answer):
                reason = f"no {trial.result} in the answer: {_quoted(answer)}"
        except OSError as error:
            cause, reason = error, str(error) or type(error).__name__
        return Probe(time.time(), reason is None, time.monotonic() - start, reason, status, cause)


def has_token(answer: bytes) -> bool:
    """Whether a completion in OpenAI's format reports at least one generated token."""
    try:
        usage = json_object(answer).get("usage")
    except ConnectionError:
        return False
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return type(tokens) is int and tokens > 0


def has_embedding(answer: bytes) -> bool:
    """Whether an answer in OpenAI's format holds one vector of finite numbers that are not all zero."""
    vectors = _field_of_each(answer, "data", "embedding")
    numbers = vectors[0] if len(vectors) == 1 and isinstance(vectors[0], list) else []
    return all(map(_is_finite, numbers)) and any(numbers)


def has_score(answer: bytes) -> bool:
    """Whether an answer of /v1/rerank holds a finite score of one document."""
    scores = _field_of_each(answer, "results", "relevance_score")
    return len(scores) == 1 and _is_finite(scores[0])


def _field_of_each(answer: bytes, key: str, field: str) -> list[Any]:
    """Return a field of each object in the list under a key; empty if the answer has another shape."""
    try:
        found = json_object(answer).get(key)
    except ConnectionError:
        return []
    return [each.get(field) for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class Trial(NamedTuple):
    """The smallest request of a role."""

    path: str
    body: dict[str, Any]
    """The request's body without the model's name."""
    succeeded: Callable[[bytes], bool]
    result: str
    """The result that `succeeded` looks for, in words."""


TRIALS: dict[Role, Trial] = {
    "generate": Trial("/v1/completions", {"prompt": "1", "max_tokens": 1, "temperature": 0}, has_token, "token"),
    "embed": Trial("/v1/embeddings", {"input": "1"}, has_embedding, "embedding"),
    "rerank": Trial("/v1/rerank", {"query": "1", "documents": ["1"]}, has_score, "score"),
}


def _quoted(answer: bytes) -> str:
    """Return the beginning of an answer."""
    return _CONTROL.sub(" ", excerpt(answer.decode(errors="replace"), QUOTED_CHARACTERS))
