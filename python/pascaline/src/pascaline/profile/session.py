"""Drives a decode on a running engine and has SGLang record it. The record starts when all requests decode."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from pascaline.errors import EngineError
from pascaline.profile.trace import is_whole
from pascaline.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

POLL_SECONDS = 0.2
TOKEN_RANGE = (10, 200)
"""Token ids that every vocabulary has."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A running engine."""

    url: str
    """Address of SGLang's API, without a slash at its end."""
    api_key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True, slots=True)
class Load:
    """What to decode during the record."""

    requests: int = 1
    """Concurrent requests."""
    prompt_tokens: int = 32
    max_tokens: int = 512
    """Most tokens that a request decodes; it is stopped with the record."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The result of a session."""

    trace: Path | None
    """None if another profiler makes the record, which it writes when the engine ends."""
    context_tokens: float
    """Tokens in the KV cache during the record, all requests together; 0 without our own load."""


class _Streams:
    """Requests that decode until they are stopped."""

    def __init__(self, target: Target, load: Load) -> None:
        self._target, self._load = target, load
        self._stop = threading.Event()
        self.tokens = [0] * load.requests
        """Number received so far, by request."""
        self.failure = ""
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(load.requests)]

    def __enter__(self) -> _Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(CONNECT_SECONDS)

    @property
    def are_decoding(self) -> bool:
        """Whether each request has its first tokens."""
        return all(count >= 2 for count in self.tokens)

    @property
    def context_tokens(self) -> int:
        """Tokens in the KV cache now."""
        return sum(self.tokens) + self._load.requests * self._load.prompt_tokens

    def _run(self, index: int) -> None:
        ids = random.Random(index).choices(range(*TOKEN_RANGE), k=self._load.prompt_tokens)  # noqa: S311 - no secret
        sampling = {"temperature": 0, "max_new_tokens": self._load.max_tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        try:
            with (
                httpx.Client(trust_env=False, headers=self._target.headers, timeout=timeout) as client,
                client.stream("POST", f"{self._target.url}/generate", json=body) as answer,
            ):
                if answer.status_code != httpx.codes.OK:
                    self.failure = f"the engine answered {answer.status_code} to a request"
                for line in answer.iter_lines():
                    self.tokens[index] += line.startswith("data: {")
                    if self._stop.is_set():
                        return
        except httpx.HTTPError as error:
            self.failure = self.failure or str(error) or type(error).__name__


def record(
    target: Target,
    folder: Path,
    *,
    steps: int,
    load: Load | None,
    timeout: float,
    external: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Recording:
    """Record some decode steps and return the trace.

    folder: the engine writes here; it must be empty and writable by the engine's user. load: None = requests of others.
    timeout: seconds for the first tokens, and again for the record. external: start and stop another profiler, under
    which the engine runs, instead of torch's.

    Raises EngineError if the engine cannot be reached, does not decode, or writes no trace.
    """
    if load is None:
        on_stage("recording")
        _start(target, folder, steps, external=external)
        return Recording(None if external else _wait_for_trace(folder, timeout, None), 0.0)
    with _Streams(target, load) as streams:
        on_stage("waiting for the first tokens")
        _wait(lambda: streams.are_decoding, timeout, streams, "no request got its first tokens")
        on_stage("recording")
        before = streams.context_tokens
        _start(target, folder, steps, external=external)
        if external:
            wanted = before + steps * load.requests
            _wait(lambda: streams.context_tokens >= wanted, timeout, streams, "the requests stopped decoding")
            _post(target, "/stop_profile", None)
            trace = None
        else:
            trace = _wait_for_trace(folder, timeout, streams)
        return Recording(trace, before + steps * load.requests / 2)


def _start(target: Target, folder: Path, steps: int, *, external: bool) -> None:
    body: dict[str, Any] = {"output_dir": str(folder), "with_stack": False, "record_shapes": True}
    # An external profiler is started by CUDA's own call and stopped by us: SGLang does not count steps for it.
    # One step more, because the step that runs when the record begins is counted but not marked in the record.
    body |= {"activities": ["CUDA_PROFILER"]} if external else {"activities": ["CPU", "GPU"], "num_steps": steps + 1}
    _post(target, "/start_profile", body)


def _post(target: Target, path: str, body: dict[str, Any] | None) -> None:
    try:
        with httpx.Client(trust_env=False, headers=target.headers, timeout=60.0) as client:
            answer = client.post(f"{target.url}{path}", json=body)
    except httpx.HTTPError as error:
        raise EngineError(f"failed to reach {target.url}{path}: {error}; is the instance running?") from error
    if answer.status_code != httpx.codes.OK:
        raise EngineError(f"{target.url}{path} answered {answer.status_code}: {redact(answer.text)[:200].strip()}")


def _wait_for_trace(folder: Path, timeout: float, streams: _Streams | None) -> Path:
    """Wait until SGLang has written a complete trace."""
    found: list[Path] = []

    def is_there() -> bool:
        found[:] = sorted(folder.rglob("*.trace.json*"))
        return bool(found) and is_whole(found[0])

    what = f"no trace appeared in {folder} (can the engine's user write there? are requests running?)"
    _wait(is_there, timeout, streams, what)
    return found[0]


def _wait(condition: Callable[[], bool], timeout: float, streams: _Streams | None, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if streams is not None and streams.failure and not condition():
            raise EngineError(f"{what}: {streams.failure}")
        if time.monotonic() >= deadline:
            raise EngineError(f"{what} within {timeout:g} s")
        time.sleep(POLL_SECONDS)


def ask(url: str, timeout: float = 3.0) -> dict[str, Any] | None:
    """Return an agent's JSON answer; None without one."""
    try:
        with httpx.Client(trust_env=False, timeout=timeout) as client:
            answer = client.get(url)
        found = json.loads(answer.content) if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, ValueError):
        return None
    return found if isinstance(found, dict) else None
