"""OpenAI's shape for errors, one sentence for what is wrong with a request, and which models are served."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sglang_pascal import openai_api
from sglang_pascal.openai_api import OpenAiErrors, explain_validation, is_served, openai_error, without_paths
from starlette.responses import JSONResponse, StreamingResponse


class Client:
    """Asks an ASGI application."""

    def __init__(self, app):
        self._transport = httpx.ASGITransport(app)

    def request(self, method, path, **options):
        async def ask():
            async with httpx.AsyncClient(transport=self._transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, **options):
        return self.request("POST", path, **options)


class Question(BaseModel):
    messages: list[str]


@pytest.fixture(scope="module")
def client():
    """An application with SGLang's shapes of errors, wrapped as the plugin does it."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(question: Question):
        return question

    @app.get("/v1/fails/{status}")
    async def fails(status: int):
        body = {"object": "error", "message": "no", "type": "BadRequestError", "param": "x", "code": status}
        return JSONResponse(body, status_code=status)

    @app.get("/v1/streams")
    async def streams():
        return StreamingResponse(iter(["data: 1\n\n", "data: 2\n\n"]), media_type="text/event-stream")

    @app.get("/v1/messages")
    async def anthropic():
        return JSONResponse({"type": "error"}, status_code=400)

    @app.get("/generate")
    async def generate():
        return JSONResponse({"object": "error", "message": "no"}, status_code=400)

    app.exception_handlers[RequestValidationError] = explain_validation(None)
    return Client(OpenAiErrors(app))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_openais_shape(client, status, kind):
    answer = client.get(f"/v1/fails/{status}")
    assert answer.status_code == status
    assert int(answer.headers["content-length"]) == len(answer.content)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == (kind, "x")


def test_a_path_that_is_not_there(client):
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"


def test_streams_and_other_apis_are_left_alone(client):
    assert client.get("/v1/streams").text == "data: 1\n\ndata: 2\n\n"
    assert client.get("/v1/messages").json() == {"type": "error"}
    assert client.get("/generate").json() == {"object": "error", "message": "no"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"messages": ["a"', "the body is not JSON: Expecting ',' delimiter at character 17"),
        ("{}", "messages: Field required"),
        (
            '{"messages": [1, 2]}',
            "messages.0: Input should be a valid string; messages.1: Input should be a valid string",
        ),
        ("[]", "Input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_sentence(client, body, message):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == message


def test_a_missing_key_says_how_to_send_one():
    error = openai_error(401, b'{"error": "Unauthorized"}')["error"]
    assert error == {
        "message": "no valid API key: send it as `Authorization: Bearer KEY`",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"\xff", b'{"error": null}', b'{"error": {"message": {}}}'])
def test_any_body_becomes_an_error(content):
    error = openai_error(500, content)["error"]
    assert isinstance(error["message"], str)
    assert error["type"] == "server_error"


def test_paths_of_the_server_are_not_shown_and_addresses_are():
    text = 'File "/opt/env/lib/python3.12/site-packages/sglang/a.py", line 3; see http://127.0.0.1:30000/v1/models; 3/4'
    assert without_paths(text) == 'File "a.py", line 3; see http://127.0.0.1:30000/v1/models; 3/4'


@pytest.mark.parametrize(
    ("name", "served"),
    [("emily", True), (None, True), ("default", True), ("emily:adapter", True), ("gpt-4", False), ("Emily", False)],
)
def test_a_name_is_that_of_the_served_model(name, served):
    assert is_served(name, "emily") == served


def test_any_name_may_be_allowed(monkeypatch):
    monkeypatch.setenv("SGLANG_PASCAL_ANY_MODEL", "1")
    assert is_served("gpt-4", "emily")


class Serving:
    """As much of SGLang's handler as the check reads."""

    class tokenizer_manager:  # noqa: N801 # SGLang's name
        served_model_name = "emily"


class Request:
    def __init__(self, **values):
        self.__dict__ |= values


def check(request, serving=None):
    async def original(serving, request, raw_request):
        return request

    return asyncio.run(openai_api.check_request(original, serving or Serving(), request, None))


def test_another_model_is_refused_with_404():
    answer = check(Request(model="gpt-4"))
    assert answer.status_code == 404
    assert json.loads(answer.body)["error"] == {
        "message": "the model 'gpt-4' does not exist; this server has 'emily'",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("tools", "choice", "parser", "refused"),
    [
        ([{}], "auto", None, True),
        ([{}], None, None, True),
        ([{}], "required", None, False),
        ([{}], object(), None, False),
        ([{}], "none", None, False),
        ([], "auto", None, False),
        (None, "auto", None, False),
        ([{}], "auto", "qwen25", False),
    ],
)
def test_tools_that_nothing_reads_calls_of_are_refused(tools, choice, parser, refused):
    request = Request(model="emily", tools=tools, tool_choice=choice)
    serving = Serving()
    serving.tool_call_parser = parser
    answer = check(request, serving)
    assert (getattr(answer, "status_code", None) == 400) == refused
    assert not refused or "set tool_call_parser" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize(
    ("tools", "choice", "parser", "reads"),
    [
        ([{}], "required", None, True),
        ([{}], object(), None, True),
        ([{}], "auto", None, False),
        ([{}], "none", None, False),
        (None, "required", None, False),
        ([{}], "required", "qwen25", False),
    ],
)
def test_a_demanded_call_is_read_without_a_parser(tools, choice, parser, reads):
    """With one, SGLang's own answer counts."""
    serving = Serving()
    serving.tool_call_parser = parser
    request = Request(model="emily", tools=tools, tool_choice=choice)
    assert openai_api.reads_tool_calls(lambda *_: False, serving, request) is reads
    assert openai_api.reads_tool_calls(lambda *_: True, serving, request) is True


def test_a_demanded_call_without_a_parser_is_one_call():
    request = check(Request(model="emily", tools=[{}], tool_choice="required", parallel_tool_calls=True))
    assert request.parallel_tool_calls is False


@pytest.mark.parametrize("kind", ["ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"])
def test_a_server_for_embeddings_refuses_text(kind):
    serving = Serving()
    serving.tokenizer_manager = type("Manager", (), {"served_model_name": "emily", "is_generation": False})
    answer = check(type(kind, (Request,), {})(model="emily"), serving)
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"]["message"].startswith("this server embeds texts and generates none")
    embeds = type("EmbeddingRequest", (Request,), {})(model="emily")
    assert check(embeds, serving) is embeds


def test_a_server_for_text_refuses_embeddings():
    answer = check(type("EmbeddingRequest", (Request,), {})(model="emily"))
    assert json.loads(answer.body)["error"]["message"] == (
        "this server generates text and embeds none: a server for embeddings has the setting role = embed"
    )


@pytest.mark.imports_sglang
def test_sglang_names_its_requests_so():
    from sglang.srt.entrypoints.openai import protocol

    assert all(hasattr(protocol, name) for name in (*openai_api.GENERATING, "EmbeddingRequest"))


def test_top_p_of_zero_takes_the_likeliest_token():
    request = check(Request(model="emily", top_p=0, top_k=-1))
    assert (request.top_p, request.top_k) == (1.0, 1)
    request = check(Request(model="emily", top_p=0.5, top_k=-1))
    assert (request.top_p, request.top_k) == (0.5, -1)
