"""Gives a request that is refused before its first token the status of the refusal, and each busy answer a Retry-After.

If the queue is full, SGLang answers a request without a stream with status 503, but 400 under /v1/responses. A stream
gets status 200 and an error as its first event, so neither a router nor a client's library tries again; Ollama's gets
an empty answer that looks whole. The start of an answer is held back until its first telling event. SGLang's own
handlers wait for their first token too. Streams of Anthropic's API and of /v1/responses begin with events that say
nothing yet, which are held back as well.

What decides is the refusal itself, noted where SGLang learns of it (`note_refusal`), in whatever form the API reports
it; the first event shows errors that SGLang finds elsewhere, such as a wrong value.

With or without a stream, SGLang does not say when to try again; a Retry-After does (RFC 9110, section 10.2.3).
"""

from __future__ import annotations

import contextvars
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_SECONDS: Final = 1
"""A queue is full for as long as one answer takes."""
_BUSY: Final = frozenset({429, 503})
_STREAMS: Final = (b"text/event-stream", b"application/x-ndjson")
"""Content types of streams; the second one is Ollama's."""
_EVENT: Final = b"data: "
_PRELUDES: Final = tuple(
    f"event: {name}\n".encode()
    for name in ("message_start", "response.created", "response.queued", "response.in_progress")
)
"""Beginnings of events that come before the first token, each once."""
_ERROR_NAME: Final = b"event: error\n"
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_timeout_error": 408,
    "rate_limit_error": 429,
    "api_error": 500,
    "overloaded_error": 503,
}
"""Types of errors in Anthropic's form, which has no code, and the statuses that SGLang makes them from."""
_LONGEST_REFUSAL: Final = 64 * 2**10
"""Bytes of an event that can be one."""


class Refusal(NamedTuple):
    """An error in place of a stream."""

    status: int
    document: dict[str, Any]
    """The body, as the API has it without a stream."""


class _Noted(NamedTuple):
    """What SGLang says of a request that it refused."""

    status: int
    message: str


class StatusOfRefusedStreams:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and watch the beginning of its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        beginning = _Beginning(send, scope.get("path", ""))
        # Tasks that the application starts for this request see it too.
        token = _BEGINNING.set(beginning)
        try:
            await self._app(scope, receive, beginning)
        finally:
            _BEGINNING.reset(token)


class _Beginning:
    """Holds the start of a stream back until the event is there that shows whether it is one."""

    def __init__(self, send: Send, path: str) -> None:
        self.noted: _Noted | None = None
        """The first refusal."""
        self._send = send
        self._path = path
        self._start: Message | None = None
        self._preludes: list[Message] = []
        self._refused = False

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            await self._receive_start(message)
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        elif _prelude(message) not in {None, *map(_prelude, self._preludes)} and self.noted is None:
            self._preludes.append(message)
        elif message.get("body") or not message.get("more_body"):
            await self._begin(self._start, message)

    async def _receive_start(self, message: Message) -> None:
        noted = self.noted
        if _is_stream(message):
            self._start = message
        elif noted is not None and message["status"] >= 400 and self._misses(message["status"], noted):
            await self._refuse(_noted_refusal(self._path, noted))
        else:
            await self._send({**message, "headers": _with_retry_after(message["status"], message.get("headers", ()))})

    def _misses(self, status: int, noted: _Noted) -> bool:
        """Whether an error does not say what SGLang refused.

        SGLang's errors in Anthropic's form say "Internal server error" then; those of Ollama's routes have FastAPI's.
        """
        return status != noted.status or (status >= 500 and self._path.startswith(("/v1/messages", "/api/")))

    async def _begin(self, start: Message, first: Message) -> None:
        self._start = None
        refusal = refusal_of(bytes(first.get("body", b"")))
        if refusal is None and self.noted is not None:
            refusal = _noted_refusal(self._path, self.noted)
        if refusal is not None:
            await self._refuse(refusal)
            return
        for each in (start, *self._preludes, first):
            await self._send(each)

    async def _refuse(self, refusal: Refusal) -> None:
        self._refused = True
        body = json.dumps(refusal.document).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers = _with_retry_after(refusal.status, headers)
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


_BEGINNING: contextvars.ContextVar[_Beginning | None] = contextvars.ContextVar("beginning", default=None)
"""The answer to the request that runs."""


async def note_refusal(original: Callable[..., Any], manager: Any, out: dict[str, Any], *rest: Any, **more: Any) -> Any:
    """Wrap `TokenizerManager._handle_abort_finish_reason`: note a refusal, in whatever form it then leaves."""
    reason = out["meta_info"]["finish_reason"]
    beginning = _BEGINNING.get()
    status = reason.get("status_code")
    if beginning is not None and beginning.noted is None and reason.get("type") == "abort" and _is_error(status):
        beginning.noted = _Noted(int(status), str(reason.get("message")))
    return await original(manager, out, *rest, **more)


def _is_error(code: Any) -> bool:
    return isinstance(code, int) and type(code) is not bool and 400 <= code <= 599


def _noted_refusal(path: str, noted: _Noted) -> Refusal:
    """Return a refusal in the shape of the API that the path belongs to."""
    status, message = noted
    if path.startswith("/v1/messages"):
        kind = next((kind for kind, code in _STATUS_OF_TYPE.items() if code == status), "api_error")
        return Refusal(status, {"type": "error", "error": {"type": kind, "message": message}})
    if path.startswith("/api/"):
        return Refusal(status, {"error": message})
    kind = "ServiceUnavailable" if status == 503 else "abort"
    return Refusal(status, {"object": "error", "message": message, "type": kind, "param": None, "code": status})


def _prelude(message: Message) -> bytes | None:
    """Return which of _PRELUDES a message is; None for any other, and for the last one of a stream."""
    body = bytes(message.get("body", b""))
    return next((each for each in _PRELUDES if message.get("more_body") and body.startswith(each)), None)


def _with_retry_after(status: int, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer, with a Retry-After if it is a busy one that has none. Names in lower case."""
    given = list(headers)
    if status in _BUSY and not any(name == b"retry-after" for name, _ in given):
        given.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    return given


def _is_stream(start: Message) -> bool:
    kind: bytes = dict(start.get("headers", ())).get(b"content-type", b"")
    return start["status"] == 200 and kind.startswith(_STREAMS)


def refusal_of(body: bytes) -> Refusal | None:
    """Return the error in the first event of a stream, as SGLang reports it without a stream; None if it is no error.

    OpenAI's routes send {"error": {…, "code": 503}}, SGLang's own an answer whose finish_reason is an abort with a
    status_code, Anthropic's an event with the name error and {"type": "error", "error": {"type": "overloaded_error"}}.
    """
    event = body.partition(b"\n\n")[0].removeprefix(_ERROR_NAME)
    if (
        not event.startswith(_EVENT)
        or len(event) > _LONGEST_REFUSAL
        or not (b'"error"' in event or b'"abort"' in event)
    ):
        return None
    try:
        document = json.loads(event.removeprefix(_EVENT))
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    error, meta = document.get("error"), document.get("meta_info")
    if isinstance(error, dict) and document.get("type") == "error":
        status = _STATUS_OF_TYPE.get(str(error.get("type")))
        return None if status is None else Refusal(status, document)
    if isinstance(error, dict):
        return _refusal(error, error.get("code"), error.get("type"))
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return _refusal(reason, reason.get("status_code"), "abort")
    return None


def _refusal(error: dict[str, Any], code: Any, kind: Any) -> Refusal | None:
    if not _is_error(code):
        return None
    message = str(error.get("message"))
    return Refusal(code, {"object": "error", "message": message, "type": str(kind), "param": None, "code": code})


def add_to_server(inner: Callable[..., Any], original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Wrap SGLang's `_setup_and_run_http_server`: wrap its application before it listens.

    inner: the next wrapper, called as this one.
    """
    from sglang.srt.entrypoints import http_server

    http_server.app.add_middleware(StatusOfRefusedStreams)
    return inner(original, *arguments, **options)
