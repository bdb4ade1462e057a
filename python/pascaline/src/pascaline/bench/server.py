"""What a server reports about itself, read once before it is measured: model, engine, limits, tokeniser."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from pascaline.bench.workload import REQUESTS_BY_WORKLOAD, Prompts, shipped_text
from pascaline.engines import ENGINES
from pascaline.engines.server import Server
from pascaline.errors import MissingError

if TYPE_CHECKING:
    from pascaline.bench.stream import Endpoint
    from pascaline.bench.workload import Workload

TIMEOUT_SECONDS = 60.0
PROBE_CHARACTERS = 2000


def describe(endpoint: Endpoint) -> Server:
    """Ask the server. Raises MissingError if no OpenAI API answers."""
    status, models = ask(endpoint, "/v1/models")
    entries = models.get("data") if isinstance(models, dict) else None
    if status != 200 or not entries:
        raise MissingError(
            f"--url: {endpoint.url}/v1/models answered with status {status}, must be 200 and list a model; "
            "is this an OpenAI API, and does it need --api-key-file?"
        )
    entry = entries[0]
    for engine in ENGINES.values():
        status, facts = ask(endpoint, engine.server_path)
        if status == 200 and isinstance(facts, dict) and (found := engine.server(entry, facts)):
            return found
    return Server(model=str(entry["id"]), engine="unknown", context_length=entry.get("max_model_len"))


def make_prompts(endpoint: Endpoint, server: Server) -> Prompts:
    """Return a maker of prompts: token ids if the server has a tokeniser, otherwise text whose density was measured."""
    # SGLang reads `prompt`, llama.cpp reads `content`; each ignores the other key.
    text = shipped_text()
    body = {"model": server.model, "prompt": text, "content": text, "add_special_tokens": False}
    status, answer = ask(endpoint, "/tokenize", body)
    tokens = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
    if tokens and all(isinstance(token, int) for token in tokens):
        return Prompts(tokens, requests=_workload_requests(endpoint, server))
    probe = {"model": server.model, "prompt": text[:PROBE_CHARACTERS], "max_tokens": 1, "temperature": 0}
    status, answer = ask(endpoint, "/v1/completions", probe)
    usage = answer.get("usage") if status == 200 and isinstance(answer, dict) else None
    if not usage or not usage.get("prompt_tokens"):
        raise MissingError(
            f"--url: {endpoint.url} has no /tokenize and answered a completion with status {status} and "
            "no token count; one of the two is needed to make prompts of a known length"
        )
    return Prompts(None, PROBE_CHARACTERS / usage["prompt_tokens"])


def _workload_requests(endpoint: Endpoint, server: Server) -> dict[Workload, list[int]]:
    found: dict[Workload, list[int]] = {}
    for workload, text in REQUESTS_BY_WORKLOAD.items():
        body = {"model": server.model, "prompt": text, "content": text, "add_special_tokens": False}
        status, answer = ask(endpoint, "/tokenize", body) if text else (200, {"tokens": []})
        if status != 200:
            raise MissingError(f"--url: {endpoint.url}/tokenize answered with status {status}, must be 200")
        found[workload] = list(answer["tokens"])
    return found


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Return (status, JSON) of a GET or, with a body, of a POST. JSON is None if the answer was not JSON.

    Raises MissingError if nothing answers.
    """
    status, answer = _exchanged(endpoint, path, body)
    return status, _parsed(answer)


def page(endpoint: Endpoint, path: str) -> tuple[int, str]:
    """Return (status, text) of a GET. Raises MissingError if nothing answers."""
    status, answer = _exchanged(endpoint, path, None)
    return status, answer.decode("utf-8", "replace")


def _exchanged(endpoint: Endpoint, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=TIMEOUT_SECONDS
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise MissingError(
            f"--url: failed to reach {endpoint.url}: {getattr(reason, 'strerror', None) or reason}; is the server up?"
        ) from error


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
