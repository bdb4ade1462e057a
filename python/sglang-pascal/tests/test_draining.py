"""New work is refused while the server drains, and what was accepted ends."""

from __future__ import annotations

import asyncio
import json

import pytest
from sglang_pascal.draining import RETRY_AFTER_SECONDS, RefuseWhileDraining


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


def call(scope, *, is_draining):
    """The messages of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    asyncio.run(RefuseWhileDraining(app, is_draining)(scope, receive, send))
    return sent


def http(method, path):
    return {"type": "http", "method": method, "path": path}


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/generate"), ("PUT", "/generate"), ("POST", "/flush_cache")],
)
def test_new_work_gets_503_and_the_connection_ends(method, path):
    start, body = call(http(method, path), is_draining=lambda: True)
    headers = dict(start["headers"])
    assert start["status"] == 503
    assert headers[b"retry-after"] == str(RETRY_AFTER_SECONDS).encode()
    assert headers[b"connection"] == b"close"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"])["code"] == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("HEAD", "/health"),
        ("OPTIONS", "/generate"),
        ("POST", "/abort_request"),
        ("POST", "/freeze_gc"),
    ],
)
def test_questions_and_ends_are_answered_and_the_connection_ends_too(method, path):
    start, body = call(http(method, path), is_draining=lambda: True)
    assert (start["status"], start["headers"]) == (200, [(b"x", b"y"), (b"connection", b"close")])
    assert body["body"] == path.encode()


def test_nothing_changes_before():
    start, body = call(http("POST", "/generate"), is_draining=lambda: False)
    assert (start["status"], start["headers"], body["body"]) == (200, [(b"x", b"y")], b"/generate")


def test_what_was_accepted_before_is_answered_whole_on_a_connection_that_ends():
    asked = iter([False, True])
    start, body = call(http("POST", "/generate"), is_draining=lambda: next(asked))
    assert (start["status"], start["headers"][-1], body["body"]) == (200, (b"connection", b"close"), b"/generate")


def test_a_web_socket_is_refused_before_it_opens():
    assert call({"type": "websocket", "path": "/v1/realtime"}, is_draining=lambda: True) == [
        {"type": "websocket.close", "code": 1013}
    ]


def test_the_start_of_the_server_is_let_through():
    assert call({"type": "lifespan"}, is_draining=lambda: True) == []
