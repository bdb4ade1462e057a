"""A stream that is refused before its first token gets the status of the refusal; any other is passed on as it is."""

import asyncio
import json

import pytest
from sglang_pascal.streams import StatusOfRefusedStreams, note_refusal, refusal_of

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


# --- refusals that SGLang notes ----------------------------------------------------------------------------------------

ABORTED = ABORT | {"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": FULL["message"]}}}
CREATED = b'event: response.created\ndata: {"type": "response.created"}\n\n'
IN_PROGRESS = b'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n'
FAILED = (
    b'event: response.failed\ndata: {"type": "response.failed", "response": {"error": {"code": "server_error"}}}\n\n'
)
OPENAI = FULL | {"type": "ServiceUnavailable", "param": None}
ANTHROPIC = {"type": "error", "error": {"type": "overloaded_error", "message": FULL["message"]}}
OLLAMA = {"error": FULL["message"]}
EMPTY_ANSWER = b'{"message": {"content": ""}, "done": true}\n'


def noted(path, *bodies, out=ABORTED, status=200, kind=b"text/event-stream", before=0, in_task=False):
    """What a client gets where SGLang refuses a request after `before` bodies, and reports that in its own way."""
    sent = []

    async def report(_manager, given):
        return given

    async def refuse():
        assert await note_refusal(report, None, out) is out

    async def application(_scope, _receive, send):
        if kind == b"application/json":
            await refuse()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for n, body in enumerate(bodies):
            if n == before:
                await (asyncio.create_task(refuse()) if in_task else refuse())
            await send({"type": "http.response.body", "body": body, "more_body": n < len(bodies) - 1})

    async def keep(message):
        sent.append(message)

    asyncio.run(StatusOfRefusedStreams(application)({"type": "http", "path": path}, None, keep))
    return sent[0], b"".join(each["body"] for each in sent[1:])


@pytest.mark.parametrize(
    ("path", "bodies", "before", "kind", "document"),
    [
        ("/v1/responses", (CREATED, IN_PROGRESS, FAILED), 2, b"text/event-stream", OPENAI),
        ("/v1/responses", (CREATED, FAILED), 0, b"text/event-stream", OPENAI),
        ("/v1/responses", (FAILED,), 0, b"text/event-stream", OPENAI),
        ("/v1/messages", (MESSAGE_START, MESSAGE_STOP), 1, b"text/event-stream", ANTHROPIC),
        ("/v1/chat/completions", (TOKEN_EVENT, DONE), 0, b"text/event-stream", OPENAI),
        ("/api/chat", (EMPTY_ANSWER,), 0, b"application/x-ndjson", OLLAMA),
        ("/api/generate", (EMPTY_ANSWER,), 0, b"application/x-ndjson", OLLAMA),
    ],
)
@pytest.mark.parametrize("in_task", [False, True])
def test_a_stream_of_any_api_gets_the_status_and_the_apis_shape(path, bodies, before, kind, document, in_task):
    start, body = noted(path, *bodies, before=before, kind=kind, in_task=in_task)
    assert (start["status"], json.loads(body)) == (503, document)
    headers = dict(start["headers"])
    assert (headers[b"retry-after"], headers[b"content-type"]) == (b"1", b"application/json")


def test_an_error_of_another_status_gets_the_refusals():
    """Under /v1/responses SGLang answers 400 where the queue is full."""
    wrong = json.dumps({"error": {"message": "503: The request queue is full.", "code": 400}}).encode()
    start, body = noted("/v1/responses", wrong, status=400, kind=b"application/json", before=-1)
    assert (start["status"], json.loads(body)) == (503, OPENAI)
    assert dict(start["headers"])[b"retry-after"] == b"1"


@pytest.mark.parametrize(
    ("path", "said", "document"),
    [
        ("/v1/messages", {"type": "error", "error": {"type": "overloaded_error", "message": "Internal"}}, ANTHROPIC),
        ("/api/chat", {"detail": FULL["message"]}, OLLAMA),
    ],
)
def test_an_answer_that_hides_the_cause_names_it(path, said, document):
    start, body = noted(path, json.dumps(said).encode(), status=503, kind=b"application/json", before=-1)
    assert (start["status"], json.loads(body)) == (503, document)


@pytest.mark.parametrize(("path", "status"), [("/v1/score", 200), ("/v1/score", 503), ("/v1/messages", 200)])
def test_an_answer_that_is_right_keeps_its_body(path, status):
    start, body = noted(path, b'{"detail": "full"}', status=status, kind=b"application/json", before=-1)
    assert (start["status"], body) == (status, b'{"detail": "full"}')


def test_a_stream_that_breaks_off_later_goes_on_as_sglang_has_it():
    start, body = noted("/v1/responses", CREATED, TOKEN_EVENT, FAILED, before=2)
    assert (start["status"], body) == (200, CREATED + TOKEN_EVENT + FAILED)


@pytest.mark.parametrize(
    "reason",
    [
        {"type": "stop"},
        {"type": "abort", "message": "by the client"},
        {"type": "abort", "status_code": None},
        {"type": "abort", "status_code": True},
        {"type": "abort", "status_code": 200},
        {"type": "stop", "status_code": 503},
    ],
)
def test_what_sglang_does_not_refuse(reason):
    start, body = noted(
        "/api/chat", EMPTY_ANSWER, out={"meta_info": {"finish_reason": reason}}, kind=b"application/x-ndjson"
    )
    assert (start["status"], body) == (200, EMPTY_ANSWER)


def test_preludes_are_held_back_within_a_limit():
    start, body = noted("/v1/responses", *[CREATED] * 50, before=-1)
    assert (start["status"], body) == (200, CREATED * 50)


def test_a_refusal_outside_of_a_request():
    async def report(_manager, given, *rest):
        return given, rest

    assert asyncio.run(note_refusal(report, None, ABORTED, "state", False)) == (ABORTED, ("state", False))
