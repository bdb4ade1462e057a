"""Who may change an instance."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.addresses import is_loopback
from pascaline.redaction import read_api_key
from pascaline.serving.guard import Guard, names_of_this_host, refusal

if TYPE_CHECKING:
    from pathlib import Path

HERE = {"host": "127.0.0.1:30001"}
NAMES = frozenset({"gpu-1"})


def check(headers: dict[str, str], client: str | None = "127.0.0.1", key: str | None = None) -> int | None:
    refused = refusal(headers, client, keys=lambda: key, names=NAMES)
    return refused.status if refused else None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_what_only_this_host_can_reach(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:30001", "[::1]:30001", "localhost:30001", "GPU-1:30001"])
def test_own_names_and_addresses(host: str) -> None:
    assert check({"host": host}) is None


@pytest.mark.parametrize(
    "host", ["", "evil.example.org", "evil.example.org:30001", "127.0.0.1.evil.example.org", "[x]"]
)
def test_a_foreign_host_is_refused_with_the_key_too(host: str) -> None:
    assert check({"host": host}) == 403
    assert check({"host": host, "authorization": "Bearer sesame"}, key="sesame") == 403


@pytest.mark.parametrize(
    "origin", ["null", "", "https://evil.example.org", "http://127.0.0.1:8080", "http://localhost:30001"]
)
def test_a_foreign_origin_is_refused(origin: str) -> None:
    assert check(HERE | {"origin": origin}) == 403


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"\xff\xfe\x00", "schlüssel".encode(), b"a\x00b"])
def test_a_key_file_that_holds_none_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    """It was replaced after the start: an empty key must not be one that everybody has."""
    file = tmp_path / "key"
    file.write_bytes(content)
    for authorization in ("Bearer ", "Bearer", "", "Bearer two words"):
        refused = refusal(
            HERE | {"authorization": authorization}, "127.0.0.1", keys=lambda: read_api_key(file), names=NAMES
        )
        assert refused is not None
        assert (refused.status, refused.reason.startswith("the API key cannot be read: ")) == (503, True)


def test_the_agents_own_pages_may() -> None:
    assert check(HERE | {"origin": "http://127.0.0.1:30001", "sec-fetch-site": "same-origin"}) is None
    assert check(HERE | {"sec-fetch-site": "cross-site"}) == 403
    assert check(HERE | {"sec-fetch-site": "same-site"}) == 403


def test_without_a_key_only_from_here() -> None:
    assert check(HERE) is None
    assert check(HERE, client="10.0.0.7") == 403
    assert check(HERE, client=None) == 403


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer sesam", "bearer sesame", "Basic sesame", "Bearer sesame "])
def test_with_a_key_nobody_without_it(given: str) -> None:
    assert check(HERE | ({"authorization": given} if given else {}), key="sesame") == 401


def test_with_the_key_from_anywhere() -> None:
    assert check({"host": "10.0.0.1:30001", "authorization": "Bearer sesame"}, client="10.0.0.7", key="sesame") is None


def test_a_key_that_cannot_be_read_opens_nothing() -> None:
    def unreadable() -> str:
        raise PermissionError(13, "denied")

    refused = refusal(HERE, "127.0.0.1", keys=unreadable, names=NAMES)
    assert refused is not None
    assert refused.status == 503


def status(**scope: Any) -> int:
    """What an application behind the guard answers."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    request = {"type": "http", "method": "POST", "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1)}
    asyncio.run(Guard(app, lambda: "sesame", NAMES)(request | {"server": ("127.0.0.1", 2)} | scope, None, send))
    return int(sent[0]["status"])


def test_the_guard_lets_questions_and_the_unix_socket_through() -> None:
    assert status() == 401
    assert status(method="DELETE") == 401
    assert status(method="GET") == 200
    assert status(server=("/run/pascaline-emily/agent.sock", None), client=None) == 200
    assert status(server=None, client=None) == 401
    assert status(headers=[(b"host", b"127.0.0.1"), (b"host", b"evil")]) == 400


def test_a_host_knows_its_name() -> None:
    assert all(names_of_this_host())
