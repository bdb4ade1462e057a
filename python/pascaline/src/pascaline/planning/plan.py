"""The plan: a model's memory on a card under given settings, whether it fits, and the engine's arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.planning.kv_cache import Pool, kv_bytes_per_token, llama_pool, sglang_pool, sglang_tokens
from pascaline.planning.memory import Part, dynamic_parts, static_parts
from pascaline.planning.speed import Speed, estimate_speed
from pascaline.planning.weights import (
    DENSE,
    DTYPE_TYPES,
    Weights,
    residence,
    stays_quantized,
    weights_on_device,
)
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.cards import Card
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.request import PlanRequest

CPU_POOL_BYTES = 2**30
"""KV cache on the CPU if no size is set: small compared with a host's memory, and enough for a few requests."""
SHORTEST_CONTEXT = 16
"""Shortest context that can be set; a test holds it against the settings."""
MAX_FRACTION = 0.98
"""Highest mem_fraction_static that is passed on: some memory must stay free for what no plan includes."""
WITH_KERNELS = "Q4_K_M or Q8_0"
"""Mixtures that the notes recommend: the usual small one and the largest whose types all have kernels."""
RESIDENT_FIRST = ("context", "process")
"""Parts that exist before SGLang measures the free memory; its memory fraction is a share of the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The memory of one model on one card, in bytes; per GPU if several share the model."""

    request: PlanRequest
    card: str
    """Name of the card's profile, or what the driver calls it."""
    model: str
    parts: tuple[Part, ...]
    """In the order of the table."""
    kv_bytes_per_token: int
    kv_tokens: int
    """Tokens that the KV cache holds, all requests together."""
    mem_fraction_static: float | None
    """The value passed to SGLang; None for llama.cpp, which has no such setting."""
    reasons: tuple[str, ...]
    """Why it does not fit, one sentence each; empty if it fits."""
    notes: tuple[str, ...]
    """Remarks about a plan that fits."""
    host_bytes: int
    """Weights that stay in the host's memory."""
    weights_read_bytes: int
    """Weights that a decode step of one request reads, without the input embedding: a step looks up only one row."""
    matrix_read_bytes: Mapping[str, int]
    """The matrices among these weights, by the type in which the engine holds them (Q4_K, F16, NF4)."""
    speed: Speed | None
    """None if the card's data do not give its speed."""
    refusals: tuple[str, ...] = ()
    """Why the engine would refuse the model even with enough memory, one sentence each."""

    @property
    def fits(self) -> bool:
        """Whether the engine can be started and can serve a request of the whole context."""
        return not self.reasons and not self.refusals

    def part(self, key: str) -> int:
        """Bytes of one part, 0 if the plan has no such part."""
        return sum(part.n_bytes for part in self.parts if part.key == key)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as the engine holds them."""
        return self.part("weights")

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.part("kv_pool")

    @property
    def total_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def card_bytes(self) -> int:
        """Memory of the device."""
        return self.request.card_bytes

    @property
    def headroom_bytes(self) -> int:
        """Bytes that stay free; negative if the plan does not fit."""
        return self.request.available_bytes - self.total_bytes

    @property
    def context_length(self) -> int:
        """Most tokens of one request."""
        return self.request.context_length

    @property
    def engine_args(self) -> tuple[str, ...]:
        """The engine's flags that follow from the plan."""
        return engine_arguments(self)

    def to_json(self) -> dict[str, Any]:
        """As plain values, for `pascaline plan --json` and the agent's /plan."""
        request = self.request
        return {
            "fits": self.fits,
            "reasons": list(self.reasons),
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "model": self.model,
            "card": self.card,
            "engine": request.engine,
            "device": request.device,
            "dtype": request.dtype,
            "kv_dtype": request.kv_dtype,
            "context_length": self.context_length,
            "max_running_requests": request.max_running_requests,
            "chunked_prefill_tokens": request.chunked_prefill_tokens,
            "activation_bits": {"prefill": request.prefill_bits, "decode": request.decode_bits},
            "mem_fraction_static": self.mem_fraction_static,
            "weights_bytes": self.weights_bytes,
            "weights_read_bytes": self.weights_read_bytes,
            "matrix_read_bytes": dict(self.matrix_read_bytes),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.kv_tokens,
            "kv_bytes": self.kv_bytes,
            "total_bytes": self.total_bytes,
            "card_bytes": self.card_bytes,
            "used_bytes": request.used_bytes,
            "headroom_bytes": self.headroom_bytes,
            "host_bytes": self.host_bytes,
            "parts": [part.to_json() for part in self.parts],
            "engine_args": list(self.engine_args),
            "tokens_per_second": self.speed.decode.tokens_per_second if self.speed else None,
            "speed": self.speed.to_json() if self.speed else None,
        }


def make_plan(spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights | None = None) -> Plan:
    """Plan one model on one card. A plan that does not fit is a result, not an exception.

    weights: the result of weights_on_device for this request, to save time if the same model is planned many times.
    """
    weights = weights or weights_on_device(spec, request)
    dynamic = dynamic_parts(spec, request, weights, card)
    pool = llama_pool(spec, request) if request.engine == "llama.cpp" else _sglang_pool(spec, request, weights, dynamic)
    parts = [*static_parts(spec, request, weights, pool), *dynamic]
    fraction = _fraction(request, parts) if request.engine == "sglang" else None
    return Plan(
        request=request,
        card=card.name,
        model=spec.name or spec.architecture,
        parts=tuple(parts),
        kv_bytes_per_token=kv_bytes_per_token(spec, request),
        kv_tokens=pool.tokens,
        mem_fraction_static=fraction,
        reasons=tuple(_reasons(spec, request, parts, pool)),
        notes=tuple(_notes(spec, request, pool, weights)),
        host_bytes=weights.host_bytes,
        weights_read_bytes=int(weights.read_bytes(1)),
        matrix_read_bytes=weights.matrix_read_bytes,
        speed=estimate_speed(spec, card, request, weights, pool.tokens),
    )


def _sglang_pool(spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: list[Part]) -> Pool:
    """The pool of the configured size; else room for every request, or as many tokens as fit, at least one request."""
    if request.max_total_tokens is not None:
        return sglang_pool(spec, request, request.max_total_tokens)
    if request.max_kv_bytes is not None:
        return sglang_pool(spec, request, sglang_tokens(spec, request, request.max_kv_bytes))
    without_pool = static_parts(spec, request, weights, Pool(0, 0, ""))
    room = _room(request, [*without_pool, *dynamic])
    if request.device == "cpu":
        room = min(room, CPU_POOL_BYTES)
    wanted = request.max_running_requests * request.context_length
    tokens = max(request.context_length, min(wanted, sglang_tokens(spec, request, max(0, room))))
    return sglang_pool(spec, request, tokens)


def _base(request: PlanRequest, parts: list[Part]) -> int:
    """Memory that SGLang finds free before it loads the model: its mem_fraction_static is a share of this."""
    return request.available_bytes - sum(part.n_bytes for part in parts if part.key in RESIDENT_FIRST)


_STATIC = frozenset({"weights", "kv_pool", "tables", "rounding"})


def _static_bytes(parts: list[Part]) -> int:
    return sum(part.n_bytes for part in parts if part.key in _STATIC)


def _room(request: PlanRequest, parts: list[Part]) -> int:
    """Bytes that these parts leave for the pool."""
    room = request.available_bytes - sum(part.n_bytes for part in parts)
    if request.mem_fraction_static is not None:
        room = min(room, int(request.mem_fraction_static * _base(request, parts)) - _static_bytes(parts))
    return room


def _fraction(request: PlanRequest, parts: list[Part]) -> float:
    """The share passed to SGLang: the configured value, or everything except half of what the dynamic parts need.

    --max-total-tokens already limits the pool; the fraction must not limit it further.
    """
    if request.mem_fraction_static is not None:
        return request.mem_fraction_static
    base = _base(request, parts)
    if base <= 0:
        return MAX_FRACTION
    slack = sum(part.n_bytes for part in parts) - _static_bytes(parts) - (request.available_bytes - base)
    needed = _static_bytes(parts) / base
    return min(MAX_FRACTION, max(math.ceil(needed * 1000) / 1000, math.floor((1 - slack / 2 / base) * 1000) / 1000))


def _reasons(spec: ModelSpec, request: PlanRequest, parts: list[Part], pool: Pool) -> list[str]:
    reasons = []
    per_token = kv_bytes_per_token(spec, request)
    if request.engine == "sglang" and pool.tokens < request.context_length:
        reasons.append(_too_small_a_pool(request, pool, per_token))
    total = sum(part.n_bytes for part in parts)
    if total > request.available_bytes:
        used = f", of which others use {format_bytes(request.used_bytes)}" if request.used_bytes else ""
        reasons.append(
            f"it needs {format_bytes(total)}, the {_place(request)} has {format_bytes(request.card_bytes)}{used}: "
            f"{format_bytes(total - request.available_bytes)} too much"
        )
    elif request.engine == "sglang" and request.mem_fraction_static is not None:
        allowed = int(request.mem_fraction_static * _base(request, parts))
        if _static_bytes(parts) > allowed:
            reasons.append(
                f"mem_fraction_static: {request.mem_fraction_static:g} leaves {format_bytes(max(0, allowed))} for "
                f"weights and KV cache, {format_bytes(_static_bytes(parts))} are needed"
            )
    return reasons


def _too_small_a_pool(request: PlanRequest, pool: Pool, per_token: int) -> str:
    """One sentence: what the pool holds, what it cannot serve, and which values would suffice."""
    needed = (request.context_length + 1) * per_token
    if request.max_kv_bytes is not None:
        held = request.max_kv_bytes // per_token
        setting = (
            f"kv_cache.max_bytes: {format_bytes(request.max_kv_bytes)} holds {held:,} tokens of this model "
            f"({format_bytes(per_token)} each)"
        )
        remedy = f"set at least {format_bytes(needed)}"
        if held > SHORTEST_CONTEXT:
            remedy += f", or context_length to {held - 1:,}"
    else:
        setting = f"kv_cache.max_tokens: {pool.tokens:,} tokens"
        remedy = f"set at least {request.context_length:,}"
        if pool.tokens >= SHORTEST_CONTEXT:
            remedy += f", or context_length to {pool.tokens:,}"
    return (
        f"{setting} and cannot serve a {request.context_length:,}-token request: {remedy}, "
        "or take a smaller kv_cache.dtype or a model with fewer KV heads"
    )


def _notes(spec: ModelSpec, request: PlanRequest, pool: Pool, weights: Weights) -> list[str]:
    notes = []
    n, wanted = request.max_running_requests, request.max_running_requests * request.context_length
    if request.engine == "sglang" and request.context_length <= pool.tokens < wanted:
        notes.append(
            f"the KV cache holds {pool.tokens:,} tokens: {n} requests at once have {pool.tokens // n:,} each, "
            f"one alone has {request.context_length:,}; longer ones wait"
        )
    if spec.context_length and request.context_length > spec.context_length:
        notes.append(f"the model was made for {spec.context_length:,} tokens")
    if weights.host_bytes:
        notes.append(f"{format_bytes(weights.host_bytes)} of input embedding stay in the host's memory")
    return notes + _expanded(spec, request)


def _expanded(spec: ModelSpec, request: PlanRequest) -> list[str]:
    """One sentence for each matrix type that sglang-pascal holds as float16 because it has no kernels for it."""
    if request.engine != "sglang" or not stays_quantized(spec, request):
        return []
    sizes: dict[str, tuple[int, int]] = {}
    for tensor in spec.tensors:
        held = residence(tensor, spec, request)
        if len(tensor.shape) > 1 and held.tensor_type == DENSE and tensor.tensor_type not in DTYPE_TYPES.values():
            in_file, on_card = sizes.get(tensor.tensor_type, (0, 0))
            sizes[tensor.tensor_type] = in_file + tensor.n_bytes, on_card + held.n_bytes
    return [
        f"{kind} has no kernels here and is held as float16: {format_bytes(on_card)} on the card for "
        f"{format_bytes(in_file)} in the file; quantise the model to {WITH_KERNELS}, or take engine llama.cpp, which "
        f"computes with {kind} as it is"
        for kind, (in_file, on_card) in sorted(sizes.items())
    ]


def _place(request: PlanRequest) -> str:
    return "card" if request.device == "cuda" else "host"


def engine_arguments(plan: Plan) -> tuple[str, ...]:
    """Return the flags that determine memory, as pascaline.engines passes them; a test compares the two."""
    request = plan.request
    if request.engine == "llama.cpp":
        types = {"fp16": "f16", "bf16": "bf16", "int8": "q8_0"}
        n = request.max_running_requests
        return (
            *("--ctx-size", str(request.context_length * n), "--parallel", str(n)),
            *("--batch-size", str(max(request.chunked_prefill_tokens, 32))),
            *("--n-gpu-layers", "999" if request.device == "cuda" else "0"),
            *("--cache-type-k", types[request.kv_dtype], "--cache-type-v", types[request.kv_dtype]),
        )
    types = {"fp16": "auto", "fp32": "auto"}
    return (
        *("--context-length", str(request.context_length)),
        *("--max-running-requests", str(request.max_running_requests)),
        *("--max-total-tokens", str(plan.kv_tokens)),
        *("--chunked-prefill-size", str(request.chunked_prefill_tokens)),
        *("--mem-fraction-static", f"{plan.mem_fraction_static:g}"),
        *("--kv-cache-dtype", types.get(request.kv_dtype, request.kv_dtype)),
    )
