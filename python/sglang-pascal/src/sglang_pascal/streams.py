"""Gives a stream that is refused before its first token the status of the refusal, and each busy answer a Retry-After.

If the queue is full, SGLang answers a request without a stream with status 503. A stream gets status 200 and an error
as its first event, so neither a router nor a client's library tries again. The first event shows the right status; the
start of an answer is held back until that event. SGLang's own handlers wait for their first token too. A stream of
Anthropic's API begins with an event that says nothing yet, so there the second one decides.

With or without a stream, SGLang does not say when to try again; a Retry-After does (RFC 9110, section 10.2.3).
"""

from __future__ import annotations

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
_EVENT_STREAM: Final = b"text/event-stream"
_EVENT: Final = b"data: "
_PRELUDE: Final = b"event: message_start\n"
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


class StatusOfRefusedStreams:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and watch the beginning of its answer."""
        if scope["type"] == "http":
            send = _Beginning(send)
        await self._app(scope, receive, send)


class _Beginning:
    """Holds the start of a stream back until the event is there that shows whether it is one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._prelude: Message | None = None
        self._refused = False

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start" and _is_stream(message):
            self._start = message
        elif message["type"] == "http.response.start":
            await self._send({**message, "headers": _with_retry_after(message["status"], message.get("headers", ()))})
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        elif self._prelude is None and message.get("more_body") and message.get("body", b"").startswith(_PRELUDE):
            self._prelude = message
        elif message.get("body") or not message.get("more_body"):
            await self._begin(self._start, message)

    async def _begin(self, start: Message, first: Message) -> None:
        self._start = None
        refusal = refusal_of(bytes(first.get("body", b"")))
        if refusal is None:
            for each in filter(None, (start, self._prelude, first)):
                await self._send(each)
            return
        self._refused = True
        body = json.dumps(refusal.document).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers = _with_retry_after(refusal.status, headers)
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _with_retry_after(status: int, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer, with a Retry-After if it is a busy one that has none. Names in lower case."""
    given = list(headers)
    if status in _BUSY and not any(name == b"retry-after" for name, _ in given):
        given.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    return given


def _is_stream(start: Message) -> bool:
    kind: bytes = dict(start.get("headers", ())).get(b"content-type", b"")
    return start["status"] == 200 and kind.startswith(_EVENT_STREAM)


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
    if type(code) is not int or not 400 <= code <= 599:
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
