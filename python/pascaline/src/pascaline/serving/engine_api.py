"""All that the supervisor asks a running engine, each as one bounded exchange with a socket of the engine's own.

Every method blocks and is run in a thread. Whatever an engine that is ill sends, the outcome is an answer, "no", or an
OSError.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.engines.client import json_object, request
from pascaline.redaction import redact
from pascaline.serving.listener import EngineListener, ForeignListenerError

if TYPE_CHECKING:
    from pascaline.engines import Engine, Progress, Task

POLL_TIMEOUT_SECONDS = 5.0
FIRST_GENERATION_SECONDS = 60.0
"""For a test generation while the engine warms up; another is sent when it fails."""
BUSY_STATUSES = frozenset({429, 503})
"""Of an engine that refuses a request because others wait."""
QUOTED_CHARACTERS = 200
"""Of an answer that is no generation, in the reason."""
QUOTED_BYTES = 16 * 2**10
"""Of it that are looked through."""
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
    """Why there was none."""

    @property
    def is_error(self) -> bool:
        """Whether the engine answered, but without a token, and not because it has too much to do."""
        return not self.ok and self.status is not None and self.status not in BUSY_STATUSES


class EngineApi:
    """The API of one run of an engine."""

    def __init__(self, engine: Engine, task: Task, leader: int) -> None:
        """leader: process id of the run, which leads a session."""
        self.foreign: str | None = None
        """Who was found on its port when it was last asked; None: the engine, or nobody."""
        self._engine = engine
        self._task = task
        self._listener = EngineListener(*task.address, leader)

    def ask(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = POLL_TIMEOUT_SECONDS
    ) -> tuple[int, bytes]:
        """Return (status, answer). Raises OSError."""
        task, self.foreign = self._task, None
        try:
            return request(
                task.address, path, body=body, api_key=task.api_key, timeout=timeout, listener=self._listener
            )
        except ForeignListenerError as error:
            self.foreign = str(error)
            raise

    def is_loaded(self) -> bool:
        """Whether it has a model."""
        try:
            return self.ask("/v1/models")[0] == 200
        except OSError:
            return False

    def version(self) -> str:
        """Return its version as it says itself; OSError where it does not."""
        return self._engine.version(self.ask)

    def progress(self) -> Progress | None:
        """Return its counters; None where it has no page of them. Raises OSError where it does not answer."""
        return self._engine.progress(self.metrics_page())

    def allocated(self) -> dict[str, int]:
        """Return what it says that it allocated. Raises OSError."""
        return self._engine.allocated(self.metrics_page())

    def metrics_page(self) -> str:
        """Return its /metrics. Raises OSError."""
        status, page = self.ask("/metrics")
        if status != 200:
            raise ConnectionError(f"/metrics: status {status}")
        return page.decode(errors="replace")

    def generate(self, timeout: float = FIRST_GENERATION_SECONDS) -> Probe:
        """Let the model generate one token, by the way that users' requests take."""
        body = {"model": self._task.model.served_name, "prompt": "1", "max_tokens": 1, "temperature": 0}
        start = time.monotonic()
        status, reason, cause = None, None, None
        try:
            status, answer = self.ask("/v1/completions", body, timeout)
            if status != 200:
                reason = f"status {status}: {_quoted(answer)}"
            elif not has_token(answer):
                reason = f"no token in the answer: {_quoted(answer)}"
        except OSError as error:
            cause, reason = error, str(error) or type(error).__name__
        return Probe(time.time(), reason is None, time.monotonic() - start, reason, status, cause)


def has_token(answer: bytes) -> bool:
    """Whether a completion in OpenAI's form says that something was generated."""
    try:
        usage = json_object(answer).get("usage")
    except ConnectionError:
        return False
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return type(tokens) is int and tokens > 0


def _quoted(answer: bytes) -> str:
    """Return the beginning of an answer; a secret in it is hidden before it can be cut in two."""
    text = redact(answer[:QUOTED_BYTES].decode(errors="replace"))
    return _CONTROL.sub(" ", text[:QUOTED_CHARACTERS])
