"""Everything that the supervisor asks a running engine, each as one bounded exchange with the engine's own socket.

Every method blocks, so the supervisor calls it in a thread. Whatever a faulty engine sends, a method returns an answer
or False, or raises OSError.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.engines import Vitals
from pascaline.engines.client import json_object, request, stream
from pascaline.redaction import redact
from pascaline.serving.listener import EngineListener, ForeignListenerError

if TYPE_CHECKING:
    from pascaline.engines import Engine, Progress, Task
    from pascaline.engines.client import Exchange

POLL_TIMEOUT_SECONDS = 5.0
FIRST_GENERATION_SECONDS = 60.0
"""Timeout of a test generation while the engine warms up; if one fails, another is sent."""
BUSY_STATUSES = frozenset({429, 503})
"""HTTP statuses of an engine that refuses a request because others wait."""
QUOTED_CHARACTERS = 200
"""Most characters that a reason quotes from an answer without a token."""
QUOTED_BYTES = 16 * 2**10
"""Bytes of such an answer that are searched for secrets before it is quoted."""
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
        """Send a request with these headers, whose answer is read while it comes. timeout: seconds for all of it.

        Raises OSError.
        """
        return stream(self._task.address, path, body=body, headers=headers, timeout=timeout, listener=self._listener)

    def is_loaded(self) -> bool:
        """Whether it has loaded its model."""
        try:
            return self.ask("/v1/models")[0] == 200
        except OSError:
            return False

    def version(self) -> str:
        """Return the version that it reports. Raises OSError if it reports none."""
        return self._engine.version(self.ask)

    def progress(self) -> Progress | None:
        """Return its counters; None if its page lacks them or is malformed. Raises OSError if it does not answer."""
        page = self.metrics_page()
        self.vitals = self._engine.vitals(page)
        return self._engine.progress(page)

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
        """Let the model generate one token, through the same API as users' requests. timeout: seconds."""
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
    """Whether a completion in OpenAI's format reports at least one generated token."""
    try:
        usage = json_object(answer).get("usage")
    except ConnectionError:
        return False
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return type(tokens) is int and tokens > 0


def _quoted(answer: bytes) -> str:
    """Return the beginning of an answer; secrets are hidden first, so that none is cut in two and shown in part."""
    text = redact(answer[:QUOTED_BYTES].decode(errors="replace"))
    return _CONTROL.sub(" ", text[:QUOTED_CHARACTERS])
