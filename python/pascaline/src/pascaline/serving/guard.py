"""Decides who may change an instance through its agent; refuses all other requests that would change it.

Through the Unix socket: everyone who may open it. Through TCP: clients with the API key if one is set, otherwise only
this host. Never a web page: a browser lets a page send requests to any address that it can reach, under any name.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.addresses import OWN_NAMES, is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    App = Callable[[Any, Any, Any], Awaitable[None]]

_ASKING = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing: RFC 9110, section 9.2.1."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The answer to a refused request: HTTP status and reason."""

    status: int
    reason: str


def refusal(
    headers: Mapping[str, str], client: str | None, *, keys: Callable[[], str | None], names: frozenset[str]
) -> Refusal | None:
    """Return why a request that came through TCP may not change anything; None if it may.

    headers: names in lower case. client: its address. keys: returns the API key, None if none is set; may raise
    OSError or ValueError. names: the names of this host, in lower case.
    """
    if refused := foreign(headers, names):
        return refused
    try:
        key = keys()
    except (OSError, ValueError) as error:
        return Refusal(503, f"the API key cannot be read: {error}")
    if key is None:
        if client is None or not is_loopback(client):
            return Refusal(403, "without an API key only this host may do this; set api_key_file, or do it there")
    elif not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        return Refusal(401, "the API key is missing or wrong; send Authorization: Bearer KEY, or use the Unix socket")
    return None


def foreign(headers: Mapping[str, str], names: frozenset[str]) -> Refusal | None:
    """Return why a request comes from elsewhere than this agent's own page or a program; None if it does not.

    headers, names: as in `refusal`.
    """
    host = headers.get("host", "")
    if not _is_ours(host, names):
        return Refusal(403, f"the Host header {host!r} is no address and no name of this host")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return Refusal(403, f"a web page of another origin ({origin!r}) may not do this")
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        return Refusal(403, "a web page of another site may not do this")
    return None


def _is_ours(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names this host. Any address counts: the client itself chose to connect to it."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() in OWN_NAMES | names
    return True


def names_of_this_host() -> frozenset[str]:
    """Return the names of this host in lower case, without asking a name server."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]})


class Guard:
    """ASGI middleware that applies `refusal` to what changes something, and `foreign` to the page and its parts."""

    def __init__(
        self, app: App, keys: Callable[[], str | None], names: frozenset[str], page: frozenset[str] = frozenset()
    ) -> None:
        """keys, names: as in `refusal`. page: paths of the agent's page."""
        self._app = app
        self._keys = keys
        self._names = names
        self._page = page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        refused = self._refusal(scope) if scope["type"] == "http" else None
        if refused is None:
            await self._app(scope, receive, send)
            return
        body = json.dumps({"detail": refused.reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Any) -> Refusal | None:
        asks = scope["method"] in _ASKING
        if asks and scope.get("path") not in self._page:
            return None
        server = scope.get("server")
        if server is not None and server[1] is None:
            return None  # a Unix socket has no port; the file system decides who may open it
        counted = [name for name, _ in scope["headers"]]
        if any(counted.count(name) > 1 for name in (b"host", b"origin", b"authorization")):
            return Refusal(400, "a header is given twice")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if asks:
            if headers.get("sec-fetch-mode") == "navigate":
                headers.pop("sec-fetch-site", None)  # a link on another page, such as a dashboard's, may lead here
            return foreign(headers, self._names)
        client = scope.get("client")
        return refusal(headers, client[0] if client else None, keys=self._keys, names=self._names)
