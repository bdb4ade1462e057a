"""The plan: a model's memory on a card under given settings, whether it fits, and the engine's arguments."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.engines import engine_named
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.planning.speed import Speed, absent_share, estimate_speed, host_speed
from pascaline.planning.weights import WeightsByPlacement
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.cards import Card
    from pascaline.engines.memory_model import Part, Pool, Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec

SHORTEST_CONTEXT = 16
"""Shortest context that can be set; a test holds it against the settings."""


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
    """The value passed to the engine; None for one that has no such setting."""
    reasons: tuple[str, ...]
    """Why it does not fit, one sentence each; empty if it fits."""
    notes: tuple[str, ...]
    """Remarks about a plan that fits."""
    host_parts: tuple[Part, ...]
    """What is in the host's memory while a GPU computes."""
    weights_read_bytes: int
    """Weights that a decode step of one request reads, without the input embedding: a step looks up only one row."""
    matrix_read_bytes: Mapping[str, int]
    """The matrices among these weights, by the type in which the engine holds them (Q4_K, F16, NF4)."""
    speed: Speed | None
    """None if the card's data do not give its speed."""
    num_hidden_layers: int
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
    def generates(self) -> bool:
        """Whether the model generates text, so that decode steps count."""
        return self.request.role == "generate"

    @property
    def host_bytes(self) -> int:
        """Bytes in the host's memory while a GPU computes."""
        return sum(part.n_bytes for part in self.host_parts)

    @property
    def where(self) -> str:
        """Where the weights are, in words: card, host, or which part is on the host."""
        request = self.request
        if request.device == "cpu":
            return "host"
        gpu_layers, experts = request.gpu_layers or ALL_LAYERS, request.expert_layers_on_host or 0
        # The output layer counts as one more; these are on the host whole, and the others in part.
        whole = max(0, self.num_hidden_layers + 1 - gpu_layers)
        words = [f"{whole} layers"] if whole else []
        words += [f"experts of {experts - whole} layers"] if experts > whole else []
        return f"{' and '.join(words)} on the host" if words else "card"

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
        engine = engine_named(self.request.engine).memory
        return engine.arguments(self.request, self.kv_tokens, self.mem_fraction_static)

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
            "role": request.role,
            "device": request.device,
            "dtype": request.dtype,
            "kv_dtype": request.kv_dtype,
            "context_length": self.context_length,
            "max_running_requests": request.max_running_requests,
            "chunked_prefill_tokens": request.chunked_prefill_tokens,
            "activation_bits": {"prefill": request.prefill_bits, "decode": request.decode_bits},
            "speculation": request.speculation.to_json(),
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
            "host_rates": _rates_json(request),
            "host_parts": [part.to_json() for part in self.host_parts],
            "where": self.where,
            "expert_layers_on_host": request.expert_layers_on_host,
            "gpu_layers": None if request.gpu_layers == ALL_LAYERS else request.gpu_layers,
            "parts": [part.to_json() for part in self.parts],
            "engine_args": list(self.engine_args),
            "tokens_per_second": self.speed.decode.tokens_per_second if self.speed and self.generates else None,
            "speed": self.speed.to_json() if self.speed else None,
        }


def _rates_json(request: PlanRequest) -> dict[str, Any] | None:
    host = host_speed(request) if request.device == "cuda" else None
    if host is None:
        return None
    return {
        "memory_bytes_per_second": host.memory_bytes_per_second,
        "is_measured": request.host_rates.memory_bytes_per_second is not None,
        "source": host.source,
        "link_bytes_per_second": host.link_bytes_per_second,
    }


def make_plan(spec: ModelSpec, card: Card, request: PlanRequest, weights: WeightsByPlacement | None = None) -> Plan:
    """Plan one model on one card. A plan that does not fit is a result, not an exception.

    What the request leaves to the plan becomes the fastest choice that fits, or the smallest if none does.
    weights: those of this model, to save time if it is planned many times.
    Raises ConfigurationError if the engine lacks the KV type.
    """
    engine = engine_named(request.engine).memory
    engine.check_kv_type(request)
    weights = weights or WeightsByPlacement(spec)
    first, *others = engine.candidates(spec, request)
    plan = _plan(spec, card, first, weights)
    if plan.fits or not others:
        return plan
    # From the second candidate on, each needs less of the card.
    index = bisect_left(others, True, key=lambda other: _plan(spec, card, other, weights).headroom_bytes >= 0)
    return _plan(spec, card, others[min(index, len(others) - 1)], weights)


def _plan(spec: ModelSpec, card: Card, request: PlanRequest, by_placement: WeightsByPlacement) -> Plan:
    engine = engine_named(request.engine).memory
    weights = by_placement.of(request)
    dynamic = engine.dynamic_parts(spec, request, weights, card)
    pool = engine.pool(spec, request, weights, dynamic)
    parts = [*engine.static_parts(spec, request, weights, pool), *dynamic]
    per_token = engine.kv_bytes_per_token(spec, request)
    host_parts = tuple(engine.host_parts(spec, request, weights)) if request.device == "cuda" else ()
    return Plan(
        request=request,
        card=card.name,
        model=spec.name or spec.architecture,
        num_hidden_layers=spec.num_hidden_layers,
        parts=tuple(parts),
        kv_bytes_per_token=per_token,
        kv_tokens=pool.tokens,
        mem_fraction_static=engine.fraction(request, parts),
        reasons=(*_reasons(request, parts, pool, per_token), *_host_reasons(request, host_parts)),
        notes=(
            *_notes(spec, request, pool, host_parts),
            *_disk_notes(request, weights, parts),
            *engine.notes(spec, request),
        ),
        host_parts=host_parts,
        weights_read_bytes=int(weights.read_bytes(1)),
        matrix_read_bytes=weights.matrix_read_bytes,
        speed=estimate_speed(spec, card, request, weights, pool.tokens),
    )


def _reasons(request: PlanRequest, parts: Sequence[Part], pool: Pool, per_token: int) -> list[str]:
    reasons = []
    if pool.tokens < request.context_length:
        reasons.append(_too_small_a_pool(request, pool, per_token))
    total = sum(part.n_bytes for part in parts)
    # A CPU reads from the file what a mapped one does not keep in memory.
    held = total - (weights_of(parts) if request.device == "cpu" and request.mapped else 0)
    if held <= request.available_bytes:
        return reasons + engine_named(request.engine).memory.reasons(request, parts)
    used = f", of which others use {format_bytes(request.used_bytes)}" if request.used_bytes else ""
    too_much = (
        f"it needs {format_bytes(total)}, the {_place(request)} has {format_bytes(request.card_bytes)}{used}: "
        f"{format_bytes(total - request.available_bytes)} too much"
    )
    if request.device == "cpu" and not request.mapped and engine_named(request.engine).keeps_weights_on_host:
        too_much += (
            "; set placement.weights to mapped to read from the file what the memory cannot hold, which is many times "
            "slower"
        )
    return [*reasons, too_much]


def weights_of(parts: Sequence[Part]) -> int:
    """Return the bytes of the weights among the parts."""
    return sum(part.n_bytes for part in parts if part.key == "weights")


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


def _notes(spec: ModelSpec, request: PlanRequest, pool: Pool, host_parts: Sequence[Part]) -> list[str]:
    notes = []
    if request.role != "generate" and pool.n_bytes:
        notes.append(
            f"role {request.role}: the KV cache holds the prompts that are computed at once, {pool.tokens:,} tokens; "
            f"a step computes {request.chunked_prefill_tokens:,} of them, and no answer grows in it"
        )
    n, wanted = request.max_running_requests, request.max_running_requests * request.context_length
    if request.role == "generate" and request.context_length <= pool.tokens < wanted:
        notes.append(
            f"the KV cache holds {pool.tokens:,} tokens: {n} requests at once have {pool.tokens // n:,} each, "
            f"one alone has {request.context_length:,}; longer ones wait"
        )
    if spec.context_length and request.context_length > spec.context_length:
        notes.append(f"the model was made for {spec.context_length:,} tokens")
    return notes + [
        f"{format_bytes(part.n_bytes)} of weights stay in the host's memory: {part.formula}"
        for part in host_parts
        if part.key == "host_weights"
    ]


def _disk_notes(request: PlanRequest, weights: Weights, parts: Sequence[Part]) -> list[str]:
    """What follows if a mapped file is larger than the memory that is free for it."""
    if request.device == "cpu":
        return _cpu_disk_notes(request, weights, parts)
    host = host_speed(request)
    absent = absent_share(request, weights) * weights.host_bytes
    if host is None or not absent:
        return []
    return [
        f"{format_bytes(absent)} of the host's weights exceed its free memory: as placement.weights is mapped, steps "
        f"read them from the file, at {host.disk_bytes_per_second / 1e9:,.1f} GB/s in this estimate"
    ]


def _cpu_disk_notes(request: PlanRequest, weights: Weights, parts: Sequence[Part]) -> list[str]:
    absent, host = sum(part.n_bytes for part in parts) - request.available_bytes, host_speed(request)
    if not request.mapped or host is None or absent <= 0:
        return []
    share = min(1.0, absent / weights.n_bytes)
    rate = host.disk_bytes_per_second / (share * weights.read_bytes(1))
    return [
        f"{format_bytes(absent)} of the weights exceed the free memory: as placement.weights is mapped, steps read "
        f"them from the file, at {host.disk_bytes_per_second / 1e9:,.1f} GB/s in this estimate, and one request is "
        f"answered with at most {rate:,.2g} tok/s"
    ]


def _host_reasons(request: PlanRequest, parts: Sequence[Part]) -> list[str]:
    """Why the host's memory does not suffice. What is mapped from the file needs none."""
    held = [part for part in parts if not (request.mapped and part.key == "host_weights")]
    needed, free = sum(part.n_bytes for part in held), request.host_memory_bytes
    if free is None or needed <= free:
        return []
    return [
        f"it needs {format_bytes(needed)} of the host's memory, which has {format_bytes(free)} free: "
        f"{format_bytes(needed - free)} too much; set placement.weights to mapped to read them from the file instead, "
        "which is many times slower where the memory is too small"
    ]


def _place(request: PlanRequest) -> str:
    return "card" if request.device == "cuda" else "host"
