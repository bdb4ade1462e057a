"""What a file server's refusal means to a user, and a URL as messages show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

MAX_WORDS = 300
"""Most characters of a server's own words that a message shows."""
_UNAUTHORIZED, _FORBIDDEN = 401, 403


def shown_url(url: str) -> str:
    """Return a URL as messages show it: without user, password and query, which may hold a token."""
    scheme, _, rest = url.partition("://")
    place = rest.partition("?")[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def status_words(response: httpx.Response, *, with_token: bool) -> str:
    """Return a status with the reason that the server gives for it (Hugging Face's X-Error-Message) and the remedy.

    with_token: whether the request carried one.
    """
    words = f"{response.status_code} {response.reason_phrase}".rstrip()
    said = "".join(filter(str.isprintable, response.headers.get("x-error-message", "")))[:MAX_WORDS].strip()
    if said:
        words += f' ("{said}")'
    return words + _remedy(response.status_code, with_token=with_token)


def _remedy(status: int, *, with_token: bool) -> str:
    if status not in {_UNAUTHORIZED, _FORBIDDEN}:
        return ""
    if not with_token:
        return "; name a file with an access token in --token-file"
    if status == _UNAUTHORIZED:
        return "; the token in --token-file is not valid there: make a new one"
    return "; the token in --token-file may not read it: ask for access on the model's page, or name another token"
