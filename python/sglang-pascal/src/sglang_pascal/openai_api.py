"""Makes SGLang answer as clients of OpenAI's API expect, in the cases in which it does not.

- An error is `{"error": {"message", "type", "param", "code"}}`, also for a missing key and for a body that is not JSON.
  It contains no path of the server.
- A model that is not served is refused with 404, as `GET /v1/models/NAME` does; $SGLANG_PASCAL_ANY_MODEL=1 accepts any.
- A request that the server's role excludes (text of a server for embeddings, and the reverse) is refused with 400.
- `top_p` 0 is greedy, as at OpenAI, and not an error.
- Without a parser of tool calls, SGLang returns a call as text. Here a call that the request demands (`tool_choice`
  `required` or a named tool) is generated under a schema and returned as a call; other tools are refused.

docs/api.md lists each feature; its tests drive a server with the `openai` package.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.names import ANY_MODEL_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Scope = MutableMapping[str, Any]
    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

NO_NAME: Final = "default"
"""The name that SGLang's protocol fills in if a request names no model."""
OTHER_SHAPES: Final = ("/v1/messages", "/v1/systemone")
"""Paths under /v1 whose errors have their own shape: Anthropic's, and System One's."""
MAX_ERROR_BYTES: Final = 2**20
"""A longer body of an error is passed on as it is."""
TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's types of errors by status; other 4xx are invalid_request_error, 5xx server_error."""
NO_TOOLS: Final = (
    "tools: no parser of tool calls is set, and the model's chat template has no form of them that is known; "
    "set tool_choice to \"required\" or to a tool's name, set tool_call_parser (SGLang's --tool-call-parser), or leave "
    "the tools out"
)
GENERATING: Final = ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest")
"""SGLang's requests for text (entrypoints/openai/protocol.py)."""
EMBEDS_NOT: Final = "this server generates text and embeds none: a server for embeddings has the setting role = embed"
_PATH: Final = re.compile(r"(?<![\w/:.])/(?:[\w.@+-]+/)+[\w.@+-]+")


class OpenAiErrors:
    """ASGI middleware, outermost: gives each error of /v1 OpenAI's shape."""

    def __init__(self, app: App) -> None:
        """Wrap an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; hold the answer back while it may be an error."""
        if scope["type"] != "http" or not _is_openai(scope["path"]):
            await self._app(scope, receive, send)
            return
        held: list[Message] = []

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_json_error(message):
                held.append(message)
            elif held:
                await _send_error(held, message, send)
            else:
                await send(message)

        await self._app(scope, receive, send_on)


def _is_openai(path: str) -> bool:
    return path.startswith("/v1/") and not path.startswith(OTHER_SHAPES)


def _is_json_error(start: Message) -> bool:
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    return start["status"] >= 400 and headers.get(b"content-type", b"").startswith(b"application/json")


async def _send_error(held: list[Message], message: Message, send: Send) -> None:
    """Collect the body behind the start in `held`; send both once it is complete."""
    held.append(message)
    start, *bodies = held
    content = b"".join(part.get("body", b"") for part in bodies)
    if message.get("more_body") and len(content) <= MAX_ERROR_BYTES:
        return
    if len(content) <= MAX_ERROR_BYTES:
        content = json.dumps(openai_error(start["status"], content), ensure_ascii=False).encode()
    headers = [(name, value) for name, value in start["headers"] if bytes(name).lower() != b"content-length"]
    if not message.get("more_body"):
        headers.append((b"content-length", str(len(content)).encode()))
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": message.get("more_body", False)})
    held.clear()


def openai_error(status: int, content: bytes) -> dict[str, Any]:
    """Return OpenAI's error object for an answer of SGLang, FastAPI or a middleware, whatever its shape."""
    try:
        found = json.loads(content)
    except ValueError:
        found = content.decode(errors="replace")
    error = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(error, dict):
        error = {"message": error}
    message = error.get("message") or error.get("detail") or ""
    code = error.get("code")
    if status == 401:
        message, code = "no valid API key: send it as `Authorization: Bearer KEY`", "invalid_api_key"
    return {
        "error": {
            "message": without_paths(message if isinstance(message, str) else json.dumps(message)),
            "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": error.get("param"),
            # SGLang repeats the status here; OpenAI has a word or null.
            "code": code if isinstance(code, str) else None,
        }
    }


def without_paths(text: str) -> str:
    """Return a text without the server's absolute paths: each becomes the name of its file; addresses stay."""
    return _PATH.sub(lambda match: match.group().rsplit("/", 1)[1], text)


def validation_message(errors: Any) -> str:
    """Put FastAPI's list of a request's faults into one sentence: the place and the fault."""
    sentences = []
    for error in errors:
        place = ".".join(str(part) for part in error.get("loc", ()) if part != "body")
        if error.get("type") == "json_invalid":
            cause = error.get("ctx", {}).get("error", "invalid")
            sentences.append(f"the body is not JSON: {cause} at character {place}")
        else:
            sentences.append(f"{place}: {error.get('msg', 'invalid')}" if place else str(error.get("msg", "invalid")))
    return "; ".join(sentences)


def explain_validation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap SGLang's handler of invalid requests: one sentence for /v1, SGLang's own answer elsewhere."""

    async def handler(request: Any, error: Any) -> Any:
        if not _is_openai(request.url.path):
            return await original(request, error)
        from starlette.responses import JSONResponse

        return JSONResponse({"error": {"message": validation_message(error.errors())}}, status_code=400)

    return handler


async def check_request(original: Callable[..., Any], serving: Any, request: Any, raw_request: Any) -> Any:
    """Wrap `OpenAIServingBase.handle_request`: refuse another model and unseen tools, and make top_p 0 greedy."""
    from starlette.responses import JSONResponse

    served = serving.tokenizer_manager.served_model_name
    if not is_served(getattr(request, "model", None), served):
        error = {
            "message": f"the model '{request.model}' does not exist; this server has '{served}'",
            "param": "model",
            "code": "model_not_found",
        }
        return JSONResponse({"error": error}, status_code=404)
    if (problem := _other_role(serving, request)) is not None:
        return JSONResponse({"error": {"message": problem}}, status_code=400)
    if _lacks_parser(serving, request):
        if not _demands_call(request):
            return JSONResponse({"error": {"message": NO_TOOLS, "param": "tools"}}, status_code=400)
        # Nothing but the schema stops a model that was not trained for calls.
        request.parallel_tool_calls = False
    if getattr(request, "top_p", None) == 0:
        request.top_p, request.top_k = 1.0, 1
    return await original(serving, request, raw_request)


def _other_role(serving: Any, request: Any) -> str | None:
    """Say what a request asks for that the server's role excludes; None for one that it may answer."""
    generates = getattr(serving.tokenizer_manager, "is_generation", True)
    generated = type(request).__name__ in GENERATING
    if generates or not generated:
        return EMBEDS_NOT if generates and type(request).__name__ == "EmbeddingRequest" else None
    return "this server embeds texts and generates none: it answers requests for embeddings; ask another for text"


def _lacks_parser(serving: Any, request: Any) -> bool:
    """Whether a chat has tools that nothing would read calls of: they would arrive as text, and look like an answer."""
    if not getattr(request, "tools", None) or getattr(request, "tool_choice", None) == "none":
        return False
    return getattr(serving, "tool_call_parser", None) is None


def _demands_call(request: Any) -> bool:
    """Whether the answer must be a call, so that SGLang constrains it to a JSON array of calls."""
    choice = getattr(request, "tool_choice", None)
    return choice == "required" or not isinstance(choice, str | None)


def reads_tool_calls(original: Callable[..., bool], serving: Any, request: Any) -> bool:
    """Wrap `OpenAIServingChat._tool_call_parsing_active`: a call that is demanded is read without a parser too."""
    return original(serving, request) or (_lacks_parser(serving, request) and _demands_call(request))


def is_served(name: str | None, served: str) -> bool:
    """Whether a request for a model of this name is for the one that is served; an adapter's name follows a colon."""
    if name is None or name == NO_NAME or os.environ.get(ANY_MODEL_VARIABLE) == "1":
        return True
    return name == served or name.startswith(f"{served}:")


def add_to_server(inner: Callable[..., Any], original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Wrap SGLang's `_setup_and_run_http_server`: put the middleware outside all others, also that of the API key.

    inner: the next wrapper, called as this one.
    """
    from fastapi.exceptions import RequestValidationError
    from sglang.srt.entrypoints import http_server

    app = http_server.app
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: OpenAiErrors(build())
    handlers = app.exception_handlers
    handlers[RequestValidationError] = explain_validation(handlers[RequestValidationError])
    return inner(original, *arguments, **options)
