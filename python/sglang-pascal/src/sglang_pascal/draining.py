"""Turns new requests away while the server shuts down, so that routers in front send them to another server.

After SIGTERM SGLang waits until no request is left, but accepts new ones meanwhile: under constant load it never ends.
From that moment on, new work gets 503 at once, and no connection is kept open for another request. Requests that were
accepted before finish as usual.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_SECONDS: Final = 5
"""About the time after which a router that checks every few seconds has noticed."""
_ASKING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that start no work."""
_NO_WORK: Final = frozenset({"/abort_request", "/freeze_gc"})
"""Paths that end work, and the one that SGLang calls itself after its warm-up."""
_TRY_AGAIN_LATER: Final = 1013
"""Close code of a web socket (IANA's registry)."""
_BODY: Final = json.dumps(
    {
        "object": "error",
        "message": "the server is draining: it takes no new requests; ask another one, or again later",
        "type": "ServiceUnavailable",
        "code": 503,
    }
).encode()


class RefuseWhileDraining:
    """ASGI middleware."""

    def __init__(self, app: App, is_draining: Callable[[], bool]) -> None:
        """is_draining: called at each request and each answer."""
        self._app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif self._is_draining() and _is_work(scope):
            await _refuse(scope, receive, send)
        else:
            await self._app(scope, receive, functools.partial(self._send_on, send))

    async def _send_on(self, send: Send, message: Message) -> None:
        if message["type"] == "http.response.start" and self._is_draining():
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)


def _is_work(scope: Scope) -> bool:
    return scope["type"] == "websocket" or (scope["method"] not in _ASKING and scope["path"] not in _NO_WORK)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})
        return
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_BODY)).encode()),
        (b"retry-after", str(RETRY_AFTER_SECONDS).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})


def add_to_server(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Wrap SGLang's `_setup_and_run_http_server`: put the middleware around its application before it listens."""
    from sglang.srt.entrypoints import http_server

    def is_draining() -> bool:
        state = http_server.get_global_state()
        return bool(state is not None and getattr(state.tokenizer_manager, "gracefully_exit", False))

    http_server.app.add_middleware(RefuseWhileDraining, is_draining=is_draining)
    return original(*arguments, **options)
