"""A stream that is refused before its first token gets the status of the refusal; any other is passed on as it is."""

import asyncio
import json

import pytest
from sglang_pascal.streams import StatusOfRefusedStreams, refusal_of

FULL = {"object": "error", "message": "The request queue is full.", "type": "SERVICE_UNAVAILABLE", "code": 503}
ERROR_EVENT = b"data: " + json.dumps({"error": FULL | {"param": None}}).encode() + b"\n\n"
ABORT = {"text": "", "meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": FULL["message"]}}}
ABORT_EVENT = b"data: " + json.dumps(ABORT).encode() + b"\n\n"
TOKEN_EVENT = b'data: {"choices": [{"text": "error abort"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def answered(
    *bodies: bytes,
    status: int = 200,
    kind: bytes = b"text/event-stream; charset=utf-8",
    scope: str = "http",
    more: tuple[tuple[bytes, bytes], ...] = (),
):
    """What a client gets where the application sends these parts."""
    sent = []

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]})
        for n, body in enumerate(bodies, 1):
            await send({"type": "http.response.body", "body": body, "more_body": n < len(bodies)})

    async def keep(message):
        sent.append(message)

    asyncio.run(StatusOfRefusedStreams(application)({"type": scope}, None, keep))
    return sent


@pytest.mark.parametrize(("event", "kind"), [(ERROR_EVENT, "SERVICE_UNAVAILABLE"), (ABORT_EVENT, "abort")])
@pytest.mark.parametrize("before", [(), (b"",)])
def test_a_full_queue_is_a_503(event, kind, before):
    start, body = answered(*before, event, DONE)
    assert start["status"] == 503
    assert dict(start["headers"])[b"retry-after"] == b"1"
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"]) == FULL | {"type": kind, "param": None}
    assert not body.get("more_body")


MESSAGE_START = b'event: message_start\ndata: {"type": "message_start", "message": {"content": []}}\n\n'
MESSAGE_STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'


def anthropic_error(kind: str) -> tuple[dict, bytes]:
    document = {"type": "error", "error": {"type": kind, "message": FULL["message"]}}
    return document, b"event: error\ndata: " + json.dumps(document).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [("overloaded_error", 503, b"1"), ("rate_limit_error", 429, b"1"), ("invalid_request_error", 400, None)],
)
@pytest.mark.parametrize("prelude", [(MESSAGE_START,), (b"", MESSAGE_START, b""), ()])
def test_a_refusal_in_anthropics_form(prelude, kind, status, said):
    document, event = anthropic_error(kind)
    start, body = answered(*prelude, event, MESSAGE_STOP)
    assert (start["status"], json.loads(body["body"])) == (status, document)
    assert dict(start["headers"]).get(b"retry-after") == said


@pytest.mark.parametrize(
    "bodies",
    [
        (MESSAGE_START, TOKEN_EVENT, MESSAGE_STOP),
        (MESSAGE_START, MESSAGE_STOP),
        (MESSAGE_START,),
        (MESSAGE_START, MESSAGE_START, anthropic_error("overloaded_error")[1]),
        (MESSAGE_START, TOKEN_EVENT, anthropic_error("overloaded_error")[1]),
        (MESSAGE_START, anthropic_error("of a kind that nobody knows")[1], MESSAGE_STOP),
    ],
)
def test_a_stream_in_anthropics_form_comes_whole(bodies):
    start, *rest = answered(*bodies)
    assert start["status"] == 200
    assert b"".join(message["body"] for message in rest) == b"".join(bodies)
    assert not rest[-1]["more_body"]


def test_another_error_keeps_its_code():
    event = ERROR_EVENT.replace(b"503", b"500")
    start, _ = answered(event, DONE)
    assert start["status"] == 500
    assert b"retry-after" not in dict(start["headers"])


@pytest.mark.parametrize(
    "bodies",
    [
        (TOKEN_EVENT, DONE),
        (TOKEN_EVENT, ERROR_EVENT, DONE),
        (b"", TOKEN_EVENT),
        (b"",),
        (b'data: {"error": "a word"}\n\n',),
        (b'data: {"error": {"code": "503"}}\n\n',),
        (b'data: {"error": {"code": true}}\n\n',),
        (b'data: {"error": {"code": 99}}\n\n',),
        (b'data: {"error": [[[\n\n',),
        (b"data: " + b'{"error":' * 200_000,),
        (b'data: ["error"]\n\n',),
        (b'data: {"meta_info": {"finish_reason": {"type": "abort"}}}\n\n',),
        (b": comment\n\n", ERROR_EVENT),
    ],
)
def test_what_is_no_refusal_is_passed_on(bodies):
    start, *rest = answered(*bodies)
    assert start["status"] == 200
    assert b"".join(message["body"] for message in rest) == b"".join(bodies)
    assert not rest[-1]["more_body"]


@pytest.mark.parametrize(("status", "kind"), [(200, b"application/json"), (500, b"text/event-stream")])
def test_other_answers_are_not_held_back(status, kind):
    start, body = answered(ERROR_EVENT, status=status, kind=kind)
    assert (start["status"], body["body"]) == (status, ERROR_EVENT)


@pytest.mark.parametrize(
    ("status", "more", "said"),
    [
        (503, (), [b"1"]),
        (429, (), [b"1"]),
        (503, ((b"retry-after", b"5"),), [b"5"]),
        (500, (), []),
        (200, (), []),
    ],
)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_a_busy_answer_says_when_to_try_again(status, more, said, kind):
    start, body = answered(DONE, status=status, kind=kind, more=more)
    assert [value for name, value in start["headers"] if name == b"retry-after"] == said
    assert (start["status"], body["body"]) == (status, DONE)


def test_a_long_event_is_no_refusal():
    assert refusal_of(b'data: {"error": {"code": 503, "message": "' + b"x" * 2**17 + b'"}}') is None
