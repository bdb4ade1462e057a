"""Other settings: the nearest that fit where a plan does not, sweeps over one setting, and the best of all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pascaline.planning.kv_cache import PADDING_TOKENS
from pascaline.planning.mixtures import MIXTURES, PERPLEXITY_LOSS, requantized
from pascaline.planning.plan import Plan, make_plan
from pascaline.planning.request import KV_DTYPES
from pascaline.planning.weights import weights_on_device
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.cards import Card
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.request import PlanRequest
    from pascaline.planning.weights import Weights

Goal = Literal["throughput", "latency", "context"]

CONTEXT_STEP = 256
MIN_CONTEXT = 512
"""Shorter contexts are of no use to anybody."""
KV_LOSS = {"fp32": 0.0, "fp16": 0.0, "bf16": 0.0, "int8": 0.01, "fp8_e5m2": 0.1}
"""Perplexity that a KV type adds: estimated; two mantissa bits of e5m2 are far coarser than int8 with a scale."""
LATENCY_PROMPT = 512
LATENCY_ANSWER = 128
"""Tokens of the request whose time `latency` minimises."""
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CHUNKS = (128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that fit, and how they differ from those that were asked for."""

    settings: dict[str, Any]
    """Setting -> value; `quantization of the file` is none of pascaline's settings, but another file."""
    sentence: str
    plan: Plan
    distance: float
    """How far from what was asked: halving a number costs 1."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"settings": self.settings, "sentence": self.sentence, "total_bytes": self.plan.total_bytes}


def nearest_fits(spec: ModelSpec, card: Card, request: PlanRequest, count: int = 3) -> list[Change]:
    """Return the nearest settings that fit, at most `count`, of different kinds where there are such."""
    fitting = sorted((one for one in _candidates(spec, card, request) if one.plan.fits), key=lambda one: one.distance)
    useful = [one for one in fitting if not any(_does_as_much(other, one) for other in fitting)]
    ranked: dict[tuple[str, ...], Change] = {}
    for change in useful:
        ranked.setdefault(tuple(sorted(change.settings)), change)
    kinds = [set(kind) for kind in ranked]
    # What changes all that another one changes, and more, comes after; then further values of the same settings.
    simple = [one for kind, one in ranked.items() if not any(other < set(kind) for other in kinds)]
    chosen: list[Change] = []
    for change in (*simple, *ranked.values(), *useful):
        if all(change.settings != other.settings for other in chosen):
            chosen.append(change)
    return sorted(chosen[:count], key=lambda change: change.distance)


def _does_as_much(simpler: Change, change: Change) -> bool:
    """Whether fewer changes give at least the same context and KV cache."""
    return (
        set(simpler.settings) < set(change.settings)
        and simpler.plan.context_length >= change.plan.context_length
        and simpler.plan.kv_tokens >= change.plan.kv_tokens
    )


def _candidates(spec: ModelSpec, card: Card, request: PlanRequest) -> Iterator[Change]:
    """Every combination of a file, a KV type, a memory fraction, and a pool, context or number of requests."""
    for mixture, file_distance in _files(spec, request):
        model = requantized(spec, mixture) if mixture else spec
        weights = weights_on_device(model, request)
        for kv_dtype, kv_distance in _kv_types(request):
            for fraction, fraction_distance in _fractions(request):
                base: dict[str, Any] = {"file_type": mixture} if mixture else {}
                if kv_dtype != request.kv_dtype:
                    base["kv_cache.dtype"] = kv_dtype
                changed = replace(request, kv_dtype=kv_dtype, mem_fraction_static=fraction)
                distance = file_distance + kv_distance + fraction_distance
                for settings, variant, further in _variants(model, card, changed, weights):
                    plan = make_plan(model, card, variant, weights)
                    both = base | settings
                    if fraction != request.mem_fraction_static:
                        both["mem_fraction_static"] = plan.mem_fraction_static
                    if both:
                        yield Change(both, _sentence(both, plan), plan, distance + further)


def _fractions(request: PlanRequest) -> Iterator[tuple[float | None, float]]:
    yield request.mem_fraction_static, 0.0
    if request.mem_fraction_static is not None and request.engine == "sglang":
        yield None, 0.3


def _files(spec: ModelSpec, request: PlanRequest) -> Iterator[tuple[str | None, float]]:
    """The file itself, then mixtures of it that take less in the engine's memory."""
    yield None, 0.0
    if request.quantization not in (None, "gguf"):
        return
    smallest, steps = 0.97 * weights_on_device(spec, request).n_bytes, 0
    for mixture in MIXTURES:
        size = weights_on_device(requantized(spec, mixture), request).n_bytes
        if size < smallest:
            smallest, steps = size, steps + 1
            yield mixture, 0.8 * steps + PERPLEXITY_LOSS[mixture]


def _kv_types(request: PlanRequest) -> Iterator[tuple[str, float]]:
    yield request.kv_dtype, 0.0
    if request.kv_dtype in ("fp16", "bf16", "fp32"):
        for kind, distance in (("int8", 0.5), ("fp8_e5m2", 0.6)):
            if kind in KV_DTYPES[request.engine]:
                yield kind, distance


def _variants(
    spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights
) -> Iterator[tuple[dict[str, Any], PlanRequest, float]]:
    """Other numbers for the same file and KV type."""
    yield {}, request, 0.0
    if request.max_total_tokens is not None or request.max_kv_bytes is not None:
        free = replace(request, max_total_tokens=None, max_kv_bytes=None)
        plan = make_plan(spec, card, free, weights)
        if plan.fits:
            tokens = plan.kv_tokens
            yield {"kv_cache.max_tokens": tokens}, replace(free, max_total_tokens=tokens), 0.4
        if request.max_kv_bytes is not None:
            n_bytes = _padded((request.context_length + PADDING_TOKENS) * plan.kv_bytes_per_token, 2**20)
            yield {"kv_cache.max_bytes": n_bytes}, replace(free, max_kv_bytes=n_bytes), 0.2
    if (shorter := longest_context(spec, card, request, weights)) and shorter < request.context_length:
        changed = replace(request, context_length=shorter)
        yield {"context_length": shorter}, changed, _halvings(request.context_length, shorter)
    for chunk in sorted((chunk for chunk in CHUNKS if chunk < request.chunked_prefill_tokens), reverse=True):
        changed = replace(request, chunked_prefill_tokens=chunk)
        if make_plan(spec, card, changed, weights).fits:
            yield {"chunked_prefill_tokens": chunk}, changed, 0.2 * _halvings(request.chunked_prefill_tokens, chunk)
            break
    if request.max_running_requests > 1 and request.engine == "llama.cpp":
        for fewer in range(request.max_running_requests - 1, 0, -1):
            changed = replace(request, max_running_requests=fewer)
            if make_plan(spec, card, changed, weights).fits:
                yield {"max_running_requests": fewer}, changed, 0.7 * _halvings(request.max_running_requests, fewer)
                break


def longest_context(
    spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights | None = None, *, together: bool = False
) -> int | None:
    """Return the longest context that fits, in steps of CONTEXT_STEP, at most the model's; None where none does.

    together: all requests at once must have room for it, not only one.
    """
    weights = weights or weights_on_device(spec, request)

    def fits(steps: int) -> bool:
        context = steps * CONTEXT_STEP
        changed = _together(request, context) if together else replace(request, context_length=context)
        return make_plan(spec, card, changed, weights).fits

    low, high = MIN_CONTEXT // CONTEXT_STEP, max(spec.context_length, request.context_length) // CONTEXT_STEP
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low * CONTEXT_STEP


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _halvings(before: float, after: float) -> float:
    return before / after - 1 if after else float("inf")


def _sentence(settings: dict[str, Any], plan: Plan) -> str:
    words = {
        "file_type": "the model quantised to {}",
        "kv_cache.dtype": "kv_cache.dtype {}",
        "kv_cache.max_tokens": "kv_cache.max_tokens {:,}",
        "kv_cache.max_bytes": "kv_cache.max_bytes {}",
        "mem_fraction_static": "mem_fraction_static {:g}",
        "context_length": "context_length {:,}",
        "chunked_prefill_tokens": "chunked_prefill_tokens {}",
        "max_running_requests": "max_running_requests {}",
    }
    shown = settings | {key: format_bytes(value) for key, value in settings.items() if key == "kv_cache.max_bytes"}
    said = " and ".join(words[key].format(value) for key, value in shown.items())
    return f"{said}: {plan.kv_tokens:,} tokens of KV cache, {plan.headroom_bytes / 2**20:,.0f} MiB to spare"


@dataclass(frozen=True, slots=True)
class Choice:
    """One combination of settings that fits, with what it is good for."""

    file_type: str
    plan: Plan
    loss: float
    """Perplexity that quantisation adds, an indication (see PERPLEXITY_LOSS)."""
    latency_seconds: float
    """Of a request of LATENCY_PROMPT and LATENCY_ANSWER tokens, alone."""

    @property
    def throughput(self) -> float:
        """Tokens per second, all requests together."""
        return self.plan.speed.decode.tokens_per_second if self.plan.speed else 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        request = self.plan.request
        return {
            "file_type": self.file_type,
            "kv_dtype": request.kv_dtype,
            "context_length": request.context_length,
            "max_running_requests": request.max_running_requests,
            "chunked_prefill_tokens": request.chunked_prefill_tokens,
            "kv_tokens": self.plan.kv_tokens,
            "total_bytes": self.plan.total_bytes,
            "headroom_bytes": self.plan.headroom_bytes,
            "tokens_per_second": self.throughput,
            "latency_seconds": self.latency_seconds,
            "perplexity_loss": self.loss,
            "engine_args": list(self.plan.engine_args),
        }


def optimize(spec: ModelSpec, card: Card, request: PlanRequest, goal: Goal, max_loss: float) -> list[Choice]:
    """Return the settings that no others beat in goal, context and quality together, the best for the goal first.

    throughput and latency keep at least the request's context; context keeps its number of requests. All requests have
    room for their whole context at once. max_loss: what loses more is left out (PERPLEXITY_LOSS, KV_LOSS).
    """
    choices = [choice for choice in _choices(spec, card, request, goal, max_loss) if choice.plan.speed]
    ranked = sorted(choices, key=lambda choice: (*_scores(choice, goal), _nearness(choice, request)), reverse=True)
    return _pareto(ranked, goal)


def _choices(spec: ModelSpec, card: Card, request: PlanRequest, goal: Goal, max_loss: float) -> Iterator[Choice]:
    for mixture in MIXTURES:
        if PERPLEXITY_LOSS[mixture] > max_loss:
            continue
        model = requantized(spec, mixture)
        weights = weights_on_device(model, request)
        for kv_dtype in _searched_kv_types(request):
            loss = PERPLEXITY_LOSS[mixture] + KV_LOSS[kv_dtype]
            if loss > max_loss:
                continue
            for chunk in CHUNKS:
                base = replace(request, kv_dtype=kv_dtype, chunked_prefill_tokens=chunk)
                for plan in _plans(model, card, base, weights, goal):
                    yield Choice(mixture, plan, loss, latency_seconds(plan))


def _searched_kv_types(request: PlanRequest) -> list[str]:
    return [kind for kind in KV_DTYPES[request.engine] if kind in (request.kv_dtype, "int8", "fp8_e5m2")]


def _plans(spec: ModelSpec, card: Card, request: PlanRequest, weights: Weights, goal: Goal) -> Iterator[Plan]:
    """The plans of one file, KV type and chunk that fit; of several numbers of requests, all that fit."""
    if goal == "context":
        longest = longest_context(spec, card, request, weights, together=True)
        if longest is not None:
            yield make_plan(spec, card, _together(request, longest), weights)
        return
    for context in _contexts(spec, request):
        for n in REQUESTS if goal == "throughput" else (1,):
            wanted = replace(request, max_running_requests=n)
            plan = make_plan(spec, card, _together(wanted, context), weights)
            if not plan.fits:
                break
            yield plan


def _contexts(spec: ModelSpec, request: PlanRequest) -> list[int]:
    """The request's context, and the model's or powers of two beyond it."""
    doubled = [request.context_length * 2**power for power in range(1, 8)]
    return [request.context_length, *(context for context in doubled if context <= spec.context_length)]


def _together(request: PlanRequest, context: int) -> PlanRequest:
    """The request with room for all of its requests at once, each of a whole context."""
    if request.engine == "llama.cpp":
        return replace(request, context_length=context, max_total_tokens=None, max_kv_bytes=None)
    tokens = request.max_running_requests * context
    return replace(request, context_length=context, max_total_tokens=tokens, max_kv_bytes=None)


def latency_seconds(plan: Plan) -> float:
    """Return the time of one request of LATENCY_PROMPT and LATENCY_ANSWER tokens on an idle engine."""
    if plan.speed is None:
        return float("inf")
    return LATENCY_PROMPT / plan.speed.prefill.tokens_per_second + LATENCY_ANSWER / plan.speed.single.tokens_per_second


def _scores(choice: Choice, goal: Goal) -> tuple[float, float, float]:
    """What is compared, larger is better: the goal first. Rounded, so that what nobody can tell apart is equal."""
    context, quality = choice.plan.context_length, -choice.loss
    if goal == "latency":
        return -round(choice.latency_seconds, 2), context, quality
    if goal == "context":
        return context, round(choice.throughput, 1), quality
    return round(choice.throughput, 1), context, quality


def _nearness(choice: Choice, request: PlanRequest) -> float:
    return -abs(choice.plan.request.chunked_prefill_tokens - request.chunked_prefill_tokens)


def _pareto(ranked: list[Choice], goal: Goal) -> list[Choice]:
    """Those that no other one equals or beats in everything; of equals the first."""
    kept: list[tuple[tuple[float, float, float], Choice]] = []
    for choice in ranked:
        scores = _scores(choice, goal)
        if not any(all(a >= b for a, b in zip(other, scores, strict=True)) for other, _ in kept):
            kept.append((scores, choice))
    return [choice for _, choice in kept]


def sweep(
    spec: ModelSpec, card: Card, request: PlanRequest, over: Literal["context", "requests", "quant"]
) -> list[Plan]:
    """Return the plans over a range of one setting, all else as it is; the quantisation names the plan's model."""
    if over == "quant":
        found = []
        for mixture in MIXTURES:
            model = requantized(spec, mixture)
            found.append(replace(make_plan(model, card, request), model=mixture))
        return found
    weights = weights_on_device(spec, request)
    if over == "requests":
        return [make_plan(spec, card, replace(request, max_running_requests=n), weights) for n in REQUESTS]
    most = max(spec.context_length, request.context_length)
    contexts = sorted({1024 * 2**power for power in range(10) if 1024 * 2**power <= most} | {request.context_length})
    return [make_plan(spec, card, replace(request, context_length=context), weights) for context in contexts]
