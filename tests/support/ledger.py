"""A ledger of requests under load: each is answered whole, refused in words, or cut with a reason; nothing else may be.

with Load(port, clients=8) as load:
    ...
assert load.ledger.silent == []
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

SILENT_SECONDS = 30.0
"""A request without any sign for this long counts as silent: no client waits for ever."""
REFUSED_PAUSE_SECONDS = 0.1
"""What a client waits after a refusal before it asks again."""


def stretch() -> float:
    """Return the factor by which limits grow on a machine with more to run than two processes for each core."""
    return max(1.0, os.getloadavg()[0] / (2 * (os.cpu_count() or 1)))


class Outcome(StrEnum):
    """What became of a request."""

    WHOLE = "whole"
    """Answered to its end."""
    REFUSED = "refused"
    """Not taken: no connection, or a status from 400 on."""
    CUT = "cut"
    """Taken and not answered whole, and the client learned that it ended: by an error, or a closed connection."""
    SILENT = "silent"
    """Neither an answer nor an end within SILENT_SECONDS."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request."""

    outcome: Outcome
    reason: str
    began: float
    """Seconds of the monotonic clock."""
    ended: float


@dataclass
class Ledger:
    """All requests of a load; every request that was sent has an entry once its client is done."""

    sent: int = 0
    entries: list[Entry] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Count a request that is about to be sent."""
        with self._lock:
            self.sent += 1

    def close(self, entry: Entry) -> None:
        """Record what became of it."""
        with self._lock:
            self.entries.append(entry)

    def count(self, outcome: Outcome) -> int:
        """Return how many requests ended like that."""
        with self._lock:
            return sum(entry.outcome is outcome for entry in self.entries)

    def reasons(self, outcome: Outcome) -> Counter[str]:
        """Return the reasons of one outcome."""
        with self._lock:
            return Counter(entry.reason for entry in self.entries if entry.outcome is outcome)

    @property
    def is_balanced(self) -> bool:
        """Whether every request that was sent has an entry, and every loss a reason."""
        with self._lock:
            told = all(entry.reason for entry in self.entries if entry.outcome is not Outcome.WHOLE)
            return told and self.sent == len(self.entries)

    def whole_since(self, when: float) -> Entry | None:
        """Return the first request that was sent after that time and answered whole."""
        with self._lock:
            later = [each for each in self.entries if each.outcome is Outcome.WHOLE and each.began >= when]
        return min(later, key=lambda entry: entry.ended, default=None)

    def __str__(self) -> str:
        """All counts, with the reasons of what was lost."""
        parts = []
        for outcome in Outcome:
            reasons = "; ".join(f"{count} {reason}" for reason, count in self.reasons(outcome).most_common(4))
            told = f" ({reasons})" if reasons.strip("0123456789 ;") else ""
            parts.append(f"{self.count(outcome)} {outcome}{told}")
        return ", ".join(parts)


def ask(port: int, *, stream: bool, tokens: int = 8, prompt: str = "a b c", key: str | None = None) -> Entry:
    """Send one completion and say what became of it."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SILENT_SECONDS * stretch())
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "stream": stream, "temperature": 0}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.connect()
    except TimeoutError:
        return Entry(Outcome.SILENT, "no connection", began, time.monotonic())
    except OSError as error:
        return Entry(Outcome.REFUSED, error.strerror or repr(error), began, time.monotonic())
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            outcome, reason = _read(connection.getresponse(), stream=stream, tokens=tokens)
        except TimeoutError:
            outcome, reason = Outcome.SILENT, "no answer and no end"
        except (OSError, http.client.HTTPException, OverflowError) as error:
            # http.client reads a length of more digits than an index has.
            outcome, reason = Outcome.CUT, type(error).__name__
    return Entry(outcome, reason, began, time.monotonic())


def _read(answer: http.client.HTTPResponse, *, stream: bool, tokens: int) -> tuple[Outcome, str]:
    text = answer.read().decode(errors="replace")
    if answer.status >= 400:
        return Outcome.REFUSED, f"status {answer.status}"
    if stream:
        ended = text.rstrip().endswith("[DONE]")
        failed = '"error"' in text
        return (Outcome.WHOLE, "") if ended and not failed else (Outcome.CUT, "the stream has no end")
    try:
        generated: Any = json.loads(text)["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Outcome.CUT, "the answer is not one"
    return (Outcome.WHOLE, "") if 0 < generated <= tokens else (Outcome.CUT, "an answer without a token")


class Load:
    """Clients that ask one request after the other while the block runs, every second of them for a stream."""

    def __init__(self, port: int, *, clients: int = 2, pause: float = 0.2, **options: Any) -> None:
        """pause: seconds between two requests of a client. options: of `ask`."""
        self.ledger = Ledger()
        self._port, self._pause, self._options = port, pause, options
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=(bool(number % 2),), daemon=True) for number in range(clients)
        ]

    def __enter__(self) -> Load:
        """Start the clients."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Let every client end its request."""
        self.stop()

    def stop(self) -> None:
        """Send no further requests, and wait for the ends of those that were sent."""
        self._over.set()
        for thread in self._threads:
            thread.join(SILENT_SECONDS * stretch() + 10)

    def _go_on(self, stream: bool) -> None:
        while not self._over.is_set():
            self.ledger.open()
            entry = ask(self._port, **({"stream": stream} | self._options))
            self.ledger.close(entry)
            self._over.wait(self._pause if entry.outcome is Outcome.WHOLE else REFUSED_PAUSE_SECONDS)
