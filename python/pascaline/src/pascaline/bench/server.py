"""What a server reports about itself, read once before it is measured: model, engine, limits, tokeniser."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.bench.workload import Prompts, shipped_text
from pascaline.errors import MissingError

if TYPE_CHECKING:
    from pascaline.bench.stream import Endpoint

TIMEOUT_SECONDS = 60.0
PROBE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server reports; None if it does not report it."""

    model: str
    """Model's name in the API."""
    engine: str
    """`sglang`, `llama.cpp` or `unknown`."""
    engine_version: str | None = None
    model_path: str | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    """Capacity of the KV pool, tokens."""
    settings: dict[str, Any] | None = None
    """Engine settings that change its speed."""


# Fields of SGLang's /server_info that change what is measured.
_SGLANG_SETTINGS = (
    "attention_backend",
    "chunked_prefill_size",
    "device",
    "disable_cuda_graph",
    "disable_overlap_schedule",
    "disable_radix_cache",
    "dtype",
    "kv_cache_dtype",
    "load_format",
    "mem_fraction_static",
    "quantization",
    "sampling_backend",
    "schedule_policy",
    "tp_size",
)


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
    for path, read in (("/server_info", _sglang), ("/props", _llama_cpp)):
        status, facts = ask(endpoint, path)
        if status == 200 and isinstance(facts, dict) and (found := read(entry, facts)):
            return found
    return Server(model=str(entry["id"]), engine="unknown", context_length=entry.get("max_model_len"))


def _sglang(entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
    if "version" not in facts:
        return None
    return Server(
        model=str(entry["id"]),
        engine="sglang",
        engine_version=str(facts["version"]),
        model_path=facts.get("model_path"),
        context_length=entry.get("max_model_len") or facts.get("context_length"),
        max_running_requests=facts.get("max_running_requests"),
        max_total_tokens=facts.get("max_total_num_tokens") or facts.get("max_total_tokens"),
        settings={key: facts[key] for key in _SGLANG_SETTINGS if key in facts},
    )


def _llama_cpp(entry: dict[str, Any], facts: dict[str, Any]) -> Server | None:
    if "total_slots" not in facts:
        return None
    context = facts.get("default_generation_settings", {}).get("n_ctx")
    return Server(
        model=str(entry["id"]),
        engine="llama.cpp",
        engine_version=facts.get("build_info"),
        model_path=facts.get("model_path"),
        context_length=context,
        max_running_requests=facts["total_slots"],
        max_total_tokens=context * facts["total_slots"] if context else None,
    )


def make_prompts(endpoint: Endpoint, server: Server) -> Prompts:
    """Return a maker of prompts: token ids if the server has a tokeniser, otherwise text whose density was measured."""
    # SGLang reads `prompt`, llama.cpp reads `content`; each ignores the other key.
    text = shipped_text()
    body = {"model": server.model, "prompt": text, "content": text, "add_special_tokens": False}
    status, answer = ask(endpoint, "/tokenize", body)
    tokens = answer.get("tokens") if status == 200 and isinstance(answer, dict) else None
    if tokens and all(isinstance(token, int) for token in tokens):
        return Prompts(tokens)
    probe = {"model": server.model, "prompt": text[:PROBE_CHARACTERS], "max_tokens": 1, "temperature": 0}
    status, answer = ask(endpoint, "/v1/completions", probe)
    usage = answer.get("usage") if status == 200 and isinstance(answer, dict) else None
    if not usage or not usage.get("prompt_tokens"):
        raise MissingError(
            f"--url: {endpoint.url} has no /tokenize and answered a completion with status {status} and "
            "no token count; one of the two is needed to make prompts of a known length"
        )
    return Prompts(None, PROBE_CHARACTERS / usage["prompt_tokens"])


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Return (status, JSON) of a GET or, with a body, of a POST. JSON is None if the answer was not JSON.

    Raises MissingError if nothing answers.
    """
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data, headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=TIMEOUT_SECONDS
        ) as answer:
            return answer.status, _parsed(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _parsed(error.read())
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
