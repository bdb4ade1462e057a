"""The one typed configuration of an instance.

Flags, TOML keys, variables, the JSON schema, the documentation and the NixOS options all come from these fields. None
means that the user chose nothing: the model, the plan or the engine decides.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, WithJsonSchema

from pascaline.addresses import is_loopback
from pascaline.defaults import PORTS, SETTINGS
from pascaline.digests import SHA256_SCHEMA, parse_sha256s
from pascaline.units import BYTES_SCHEMA, SECONDS_SCHEMA, parse_bytes, parse_seconds

Port = Annotated[int, Field(ge=1, le=65535)]
Bytes = Annotated[int, Strict(), BeforeValidator(parse_bytes), WithJsonSchema(BYTES_SCHEMA)]
Seconds = Annotated[float, Strict(), BeforeValidator(parse_seconds), WithJsonSchema(SECONDS_SCHEMA)]
Sha256s = Annotated[tuple[str, ...] | None, BeforeValidator(parse_sha256s), WithJsonSchema(SHA256_SCHEMA)]

ENGINES_FOLDER = Path(__file__).parent / "engines"
ENGINE_FILE = "engine.toml"
"""In each folder of an engine: its name, constants and measured speeds."""


KV_TYPES = "kv_types"
"""Table of that file: our name of a type of the KV cache -> what the engine calls it."""


def _engine_files() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of each engine -> (its folder, the types of its KV cache), the default first: settings import no engine."""
    found = {}
    for file in sorted(ENGINES_FOLDER.glob(f"*/{ENGINE_FILE}")):
        entry = tomllib.loads(file.read_text(encoding="utf-8"))
        found[str(entry["name"])] = (file.parent.name, entry[KV_TYPES])
    return dict(sorted(found.items(), key=lambda item: item[0] != SETTINGS["engine"]))


def _kv_types() -> list[str]:
    """The types that kv_cache.dtype may name, of all engines together, those of the default first."""
    every = [item for _, types in _ENGINE_FILES.values() for item in types.items()]
    return list(dict.fromkeys(name for name, entry in every if entry.get("can_be_set", True)))


_ENGINE_FILES: Final = _engine_files()
ENGINE_FOLDERS: Final = {name: folder for name, (folder, _) in _ENGINE_FILES.items()}
if TYPE_CHECKING:
    EngineName = str
    KvTypeName = str
else:
    EngineName = Literal[tuple(ENGINE_FOLDERS)]
    KvTypeName = Literal[("auto", *_kv_types())]

Role = Literal["generate", "embed", "rerank"]

BUILTIN_MODEL = "builtin:smollm2-135m"


class KvCacheSettings(BaseModel):
    """Size and type of the KV pool, which all requests share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Tokens that the KV pool holds")
    max_bytes: Bytes | None = Field(
        None, ge=1, description="Bytes of the KV pool, for example 512 MiB; the plan turns it into tokens"
    )
    dtype: KvTypeName = Field("auto", description="Type of a stored key or value; auto is the type of the computation")


def _number(value: Any) -> Any:
    """Convert the texts 8 and 16 of a flag or a variable into numbers; anything else is returned unchanged."""
    return int(value) if value in ("8", "16") else value


ActivationBits = Annotated[Literal["auto", 8, 16], BeforeValidator(_number)]


class ActivationBitsSettings(BaseModel):
    """Number of bits of activations when they are multiplied with the weights of a GGUF file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: ActivationBits = Field(
        "auto",
        description="Bits in prefill; auto: 8 on a GPU if the model's hidden size is at least 2048, otherwise 16",
    )
    decode: ActivationBits = Field(
        "auto",
        description="Bits in decode steps; auto: 16 if max_running_requests is at most 6 (then it costs little time), "
        "otherwise as auto in prefill",
    )


def _count(value: Any) -> Any:
    """Convert the digits of a flag or a variable into a number; anything else is returned unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


LayerCount = Annotated[int, Strict(), Field(ge=0, le=4096)]


class PlacementSettings(BaseModel):
    """What stays in the host's memory while the GPU computes the rest. Only llama.cpp can do that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: Annotated[Literal["auto", "gpu", "cpu"] | LayerCount, BeforeValidator(_count)] = Field(
        "auto",
        description="Where the experts of a mixture are. auto: the host's memory holds those of as few first layers as "
        "the card's memory requires; gpu: all on the GPU; cpu: all on the host; a number: those of that many first "
        "layers on the host",
    )
    layers: Annotated[Literal["auto", "gpu"] | LayerCount, BeforeValidator(_count)] = Field(
        "gpu",
        description="Whole layers that the host's memory holds and its CPU computes, which is slow. gpu: none; auto: "
        "as few as the card's memory requires; a number: that many first layers",
    )
    weights: Literal["pinned", "mapped", "locked"] = Field(
        "pinned",
        description="How the host holds its part of the weights: pinned in memory, or mapped from the file, which "
        "also serves a file larger than the memory but computes prompts several times slower; locked: mapped, and kept "
        "in memory, for which the limit of locked memory must allow it (also on a CPU)",
    )


class SpeculativeSettings(BaseModel):
    """Several tokens per read of the weights: some are drafted cheaply, one step of the model verifies them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["auto", "none", "lookup", "draft", "eagle3", "mtp"] = Field(
        "auto",
        description="Where drafts come from. lookup: what followed the same words in prompt or answer; draft: a "
        "smaller model; eagle3 and mtp: heads trained for the model, in a file of their own or in the model's. SGLang "
        "has lookup and draft, and auto means draft if draft_model is set, otherwise lookup on a GPU with at least 1 "
        "GiB of weights, otherwise none; llama.cpp has all of them, and auto means none",
    )
    tokens: int | None = Field(
        None,
        ge=1,
        le=15,
        description="Most tokens drafted for a request in one step; default: what the method does best",
    )
    draft_model: Path | None = Field(
        None, description="GGUF file of the smaller model or the heads, with the same tokenizer"
    )


class Settings(BaseModel):
    """All settings of one instance."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(
        BUILTIN_MODEL,
        min_length=1,
        description="GGUF file, Hugging Face folder with safetensors, name in the library (`pascaline models`), or "
        + BUILTIN_MODEL,
    )
    model_sha256: Sha256s = Field(
        None,
        description="Checksum that the GGUF file must have at every start of the engine; for a split model a list, one "
        "for each part in order; for a folder, the one that `pascaline models checksum FOLDER` prints",
    )
    served_model_name: str | None = Field(
        None,
        min_length=1,
        description="Name of the model in the API and in metrics; default: the file's name",
    )
    any_model_name: bool = Field(
        False,
        description="Whether a request may name any model; if not, SGLang answers 404 if the name is not the served "
        "one. llama.cpp accepts any name",
    )
    card: str | None = Field(
        None, description="Card profile to start from; default: that of this host's GPU, or cpu if there is none"
    )
    engine: EngineName = Field(SETTINGS["engine"], description="Engine that runs the model")
    engine_executable: Path | None = Field(
        None,
        description="sglang: Python that can import it (default: this one); llama.cpp: llama-server (default: on PATH)",
    )
    role: Role = Field(
        "generate",
        description="What the model is for. generate: text; embed: vectors, at /v1/embeddings; rerank: scores of "
        "documents, at /v1/rerank (llama.cpp only). The model's file must say the same",
    )
    host: str = Field(SETTINGS["host"], min_length=1, description="Address on which the engine's API listens")
    port: Port = Field(PORTS.engine, description="Port of the engine's API")
    agent_host: str = Field(SETTINGS["agent_host"], min_length=1, description="Address on which the agent listens")
    agent_port: Port = Field(PORTS.agent, description="Port of the agent: health, metrics, plan, drain")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto: cuda if a GPU is present, otherwise cpu"
    )
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="Type of the computation; auto: float16 on Pascal, the fastest for the CPU otherwise"
    )
    context_length: int | None = Field(
        None, ge=16, le=2**24, description="Most tokens of one request, prompt and answer; default: the model's limit"
    )
    max_running_requests: int = Field(4, ge=1, le=4096, description="Most requests that run at once")
    max_queued_requests: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Most requests that wait; further ones are refused with 503. Default: no limit",
    )
    mem_fraction_static: float | None = Field(
        None, gt=0.0, lt=1.0, description="Share of the card's memory for weights and KV pool"
    )
    schedule_policy: Literal["fcfs", "lpm", "random", "dfs-weight"] = Field(
        "fcfs", description="Order in which waiting requests are started"
    )
    tool_call_parser: str = Field(
        "auto",
        min_length=1,
        description="How SGLang reads tool calls from an answer: one of its --tool-call-parser names; auto: chosen by "
        "the model's family and chat template; none: calls stay text, except those that a request demands",
    )
    reasoning_parser: str = Field(
        "auto",
        min_length=1,
        description="How SGLang separates reasoning from an answer: one of its --reasoning-parser names; auto: chosen "
        "by the model's family and chat template; none: reasoning stays in the answer",
    )
    chunked_prefill_tokens: int = Field(
        512,
        ge=16,
        le=65536,
        description="Most prompt tokens that one step computes; small values keep running answers smooth",
    )
    kv_cache: KvCacheSettings = Field(KvCacheSettings(), description="The KV pool")
    placement: PlacementSettings = Field(
        PlacementSettings(), description="What stays in the host's memory while a GPU computes the rest (llama.cpp)"
    )
    radix_cache: bool = Field(True, description="Whether prompts with the same beginning share its KV cache")
    activation_bits: ActivationBitsSettings = Field(
        ActivationBitsSettings(), description="Precision of matrix products: 8 bits are faster, 16 more exact"
    )
    speculative: SpeculativeSettings = Field(SpeculativeSettings(), description="Speculation: tokens that are drafted")
    attention_backend: str | None = Field(None, min_length=1, description="SGLang's attention backend; default: pascal")
    quantization: str | None = Field(
        None, min_length=1, description="SGLang's quantisation method for safetensors models"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs that share every layer")
    pipeline_parallel: int = Field(1, ge=1, le=64, description="Groups of GPUs that hold consecutive layers")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of the engine; default: one for each CPU that affinity and quota (cpu.max) allow",
    )
    api_key_file: Path | None = Field(
        None, description="File with the API key that requests must carry; the key itself is never a setting"
    )
    allow_unauthenticated: bool = Field(
        False, description="Whether API and agent may be reachable from other hosts without an API key"
    )
    extra_args: tuple[str, ...] = Field(
        (), description="Further arguments of the engine; one that a setting controls is refused"
    )
    environment: dict[str, str] = Field({}, description="Further variables of the engine's process")
    debug: bool = Field(
        False, description="Synchronous kernel launches and verbose logs: these help to find errors, but are slow"
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder for prepared models and checksums; default: $CACHE_DIRECTORY, otherwise the user's",
    )
    start_timeout: Seconds = Field(1800.0, gt=0, le=86400, description="Longest time from start to ready")
    drain_timeout: Seconds = Field(
        float(SETTINGS["drain_timeout"]), ge=0, le=86400, description="Longest wait for running requests when stopping"
    )
    stall_timeout: Seconds = Field(
        45.0, gt=0, le=3600, description="Time without progress after which an engine with work to do is restarted"
    )
    probe_interval: Seconds = Field(
        15.0, gt=0, le=3600, description="Time between two test generations of an idle engine"
    )
    on_oom: Literal["fail", "shrink"] = Field(
        "fail",
        description="After the engine ran out of memory: fail starts it again with the same settings, if it had been "
        "ready before; shrink starts it with the next smaller KV cache, context or chunk that the plan knows",
    )
    max_restarts: int = Field(5, ge=0, le=1000, description="Consecutive crashes after which the instance gives up")
    allow_overcommit: bool = Field(False, description="Whether to start even if the plan does not fit the card")


def contradictions(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for values that contradict each other. Checks only what needs no I/O."""
    return [
        (key, sentence)
        for check in (
            _kv_cache_problems,
            _address_problems,
            _patience_problems,
            _speculative_problems,
            _environment_problems,
        )
        for key, sentence in check(settings)
    ]


def _kv_cache_problems(settings: Settings) -> list[tuple[str, str]]:
    pool, context = settings.kv_cache, settings.context_length
    problems = []
    if pool.max_tokens is not None and pool.max_bytes is not None:
        problems.append(("kv_cache.max_bytes", "is set beside kv_cache.max_tokens, must be the only one of the two"))
    if pool.max_tokens is not None and context is not None and pool.max_tokens < context:
        sentence = f"{pool.max_tokens} tokens cannot hold one request, must be at least context_length ({context})"
        problems.append(("kv_cache.max_tokens", sentence))
    return problems


def _address_problems(settings: Settings) -> list[tuple[str, str]]:
    problems = []
    if settings.port == settings.agent_port:
        problems.append(("agent_port", f"{settings.agent_port} is the engine's port too, must be another"))
    if settings.api_key_file is None and not settings.allow_unauthenticated:
        problems += [
            (
                key,
                f"{host!r} can be reached from beyond this host and there is no API key, must be a loopback address; "
                "set api_key_file, or allow_unauthenticated if the network itself keeps others away",
            )
            for key, host in (("host", settings.host), ("agent_host", settings.agent_host))
            if not is_loopback(host)
        ]
    return problems


def _speculative_problems(settings: Settings) -> list[tuple[str, str]]:
    method = settings.speculative.method
    if method in ("auto", "none") or settings.role == "generate":
        return []
    sentence = f"{method!r} drafts tokens of answers, must be auto or none, as role is {settings.role!r}"
    return [("speculative.method", sentence)]


def _patience_problems(settings: Settings) -> list[tuple[str, str]]:
    """An idle engine makes progress only by test generations: one must fit into stall_timeout."""
    if settings.stall_timeout < 2 * settings.probe_interval:
        least = f"at least twice probe_interval ({settings.probe_interval:g} s)"
        return [
            ("stall_timeout", f"{settings.stall_timeout:g} s leaves no time for a test generation, must be {least}")
        ]
    return []


def _environment_problems(settings: Settings) -> list[tuple[str, str]]:
    return [
        (f"environment.{name}", f"{name!r} is not a variable's name, must be without '=' and not empty")
        for name in settings.environment
        if not name or "=" in name
    ]
