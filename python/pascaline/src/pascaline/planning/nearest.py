"""The nearest settings that fit, for a plan that does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from pascaline.engines import ENGINES, engine_named
from pascaline.errors import ConfigurationError
from pascaline.planning.mixtures import MIXTURES, PERPLEXITY_LOSS, requantized
from pascaline.planning.plan import Plan, make_plan
from pascaline.planning.request import request_from_settings
from pascaline.planning.weights import WeightsByPlacement, weights_on_device
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.cards import Card
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

CONTEXT_STEP = 256
MIN_CONTEXT = 512
"""Shorter contexts are not useful."""
CHUNKS = (128, 256, 512, 1024)
"""Values of chunked_prefill_tokens that are tried."""

# Cost of a change, to rank it: halving a number costs 1 (_shrinkage); for some numbers it costs less.
POOL_DISTANCE, ONE_REQUEST_DISTANCE = 0.4, 0.2
KV_DISTANCE, KV_STEP_DISTANCE = 0.5, 0.1
FILE_STEP_DISTANCE = 0.8
FRACTION_DISTANCE = 0.3
EXPERTS_DISTANCE, LAYERS_DISTANCE = 0.1, 0.7
"""Weights in the host's memory change no answer; whole layers there cost the most time."""
CHUNK_WEIGHT, REQUESTS_WEIGHT = 0.2, 0.7

_WORDS = {
    "engine": "engine {}",
    "file_type": "the model quantised to {}",
    "kv_cache.dtype": "kv_cache.dtype {}",
    "kv_cache.max_tokens": "kv_cache.max_tokens {:,}",
    "kv_cache.max_bytes": "kv_cache.max_bytes {}",
    "mem_fraction_static": "mem_fraction_static {:g}",
    "context_length": "context_length {:,}",
    "chunked_prefill_tokens": "chunked_prefill_tokens {}",
    "max_running_requests": "max_running_requests {}",
    "placement.experts": "placement.experts {}",
    "placement.layers": "placement.layers {}",
}

_Variant = tuple[dict[str, Any], "PlanRequest", float]
"""Changed settings, the request with them, and what they cost."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that fit, and how they differ from those that were asked for."""

    settings: dict[str, Any]
    """Setting -> value. `file_type` is not a setting of pascaline: it means the model in that quantisation."""
    sentence: str
    plan: Plan
    distance: float
    """Distance from the requested settings: halving a number costs 1."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"settings": self.settings, "sentence": self.sentence, "total_bytes": self.plan.total_bytes}


def nearest_fits(spec: ModelSpec, card: Card, request: PlanRequest, count: int = 3) -> list[Change]:
    """Return the nearest settings that fit, at most `count`, of different kinds if possible."""
    fitting = sorted((one for one in _candidates(spec, card, request) if one.plan.fits), key=lambda one: one.distance)
    useful = [one for one in fitting if not any(_does_as_much(other, one) for other in fitting)]
    ranked: dict[tuple[str, ...], Change] = {}
    for change in useful:
        ranked.setdefault(tuple(sorted(change.settings)), change)
    kinds = [set(kind) for kind in ranked]
    # A choice that changes more settings than a simpler one comes later; then further values of the same settings.
    simple = [one for kind, one in ranked.items() if not any(other < set(kind) for other in kinds)]
    chosen: list[Change] = []
    for change in (*simple, *ranked.values(), *useful):
        if all(change.settings != other.settings for other in chosen):
            chosen.append(change)
    return sorted(chosen[:count], key=lambda change: change.distance)


STEP_SHARE = 0.05
"""Share of a plan's memory that the next smaller one needs less, at most half of its KV cache."""
SHRINKABLE = frozenset({"kv_cache.max_tokens", "context_length", "chunked_prefill_tokens", "max_running_requests"})
"""Settings that `next_smaller` changes: none of them changes what the model answers."""


def next_smaller(spec: ModelSpec, card: Card, plan: Plan) -> Change | None:
    """Return the nearest settings that need less memory than a plan that turned out too large; None if there are none.

    The plan is made again for a device that has so much less memory.
    """
    request = plan.request
    step = int(min(STEP_SHARE * plan.total_bytes, plan.kv_bytes / 2))
    tight = replace(request, card_bytes=request.used_bytes + plan.total_bytes - max(step, 1))
    smaller = make_plan(spec, card, tight)
    if smaller.fits and smaller.kv_tokens < plan.kv_tokens and engine_named(request.engine).memory.shares_pool:
        settings: dict[str, Any] = {"kv_cache.max_tokens": smaller.kv_tokens}
        return Change(settings, _sentence(settings, smaller), smaller, POOL_DISTANCE)
    changes = nearest_fits(spec, card, tight, count=len(SHRINKABLE) * len(CHUNKS))
    return next((change for change in changes if set(change.settings) <= SHRINKABLE), None)


def other_engine_fits(settings: Settings, spec: ModelSpec, card: Card, request: PlanRequest) -> list[Change]:
    """Return the other engines that serve the model on this card under the same settings, as changes of `engine`."""
    found = []
    for engine in ENGINES:
        other = settings.model_copy(update={"engine": engine})
        if engine == request.engine or not _takes(other, spec):
            continue
        try:
            wanted = request_from_settings(
                other,
                spec,
                device=request.device,
                dtype=request.dtype,
                card_bytes=request.card_bytes,
                used_bytes=request.used_bytes,
                host_memory_bytes=request.host_memory_bytes,
                host_rates=request.host_rates,
            )
        except ConfigurationError:
            continue
        plan = make_plan(spec, card, wanted)
        if plan.fits:
            found.append(Change({"engine": engine}, _sentence({"engine": engine}, plan), plan, 0.0))
    return found


def _takes(settings: Settings, spec: ModelSpec) -> bool:
    """Whether the settings' engine accepts the other settings and the model."""
    engine = engine_named(settings.engine)
    return not engine.problems(settings) and not engine.judge_as(spec, settings.role).refusals


def _does_as_much(simpler: Change, change: Change) -> bool:
    """Whether fewer changes give at least the same context and KV cache."""
    return (
        set(simpler.settings) < set(change.settings)
        and simpler.plan.context_length >= change.plan.context_length
        and simpler.plan.kv_tokens >= change.plan.kv_tokens
    )


def _candidates(spec: ModelSpec, card: Card, request: PlanRequest) -> Iterator[Change]:
    """Another placement, and every combination of a file, a KV type, a memory fraction, and one other number."""
    yield from _placements(spec, card, request)
    for (mixture, file_cost), (kv_dtype, kv_cost), (fraction, fraction_cost) in product(
        _files(spec, request), _kv_types(request), _fractions(request)
    ):
        model = requantized(spec, mixture) if mixture else spec
        weights = WeightsByPlacement(model)
        base: dict[str, Any] = {"file_type": mixture} if mixture else {}
        if kv_dtype != request.kv_dtype:
            base["kv_cache.dtype"] = kv_dtype
        changed = replace(request, kv_dtype=kv_dtype, mem_fraction_static=fraction)
        for settings, variant, cost in _variants(model, card, changed, weights):
            plan = make_plan(model, card, variant, weights)
            every = base | settings
            if fraction != request.mem_fraction_static:
                every["mem_fraction_static"] = plan.mem_fraction_static
            if every:
                yield Change(every, _sentence(every, plan), plan, file_cost + kv_cost + fraction_cost + cost)


def _placements(spec: ModelSpec, card: Card, request: PlanRequest) -> Iterator[Change]:
    """The host's memory for experts, or for whole layers, if the request leaves none to the plan."""
    if request.device != "cuda" or not engine_named(request.engine).keeps_weights_on_host:
        return
    variants: list[_Variant] = []
    if spec.num_experts and request.expert_layers_on_host is not None:
        free = replace(request, expert_layers_on_host=None)
        variants.append(({"placement.experts": "auto"}, free, EXPERTS_DISTANCE))
    if request.gpu_layers is not None:
        variants.append(({"placement.layers": "auto"}, replace(request, gpu_layers=None), LAYERS_DISTANCE))
    for settings, variant, cost in variants:
        plan = make_plan(spec, card, variant)
        yield Change(settings, _sentence(settings, plan), plan, cost)


def _files(spec: ModelSpec, request: PlanRequest) -> list[tuple[str | None, float]]:
    """The file itself, then its mixtures that need less of the engine's memory."""
    found: list[tuple[str | None, float]] = [(None, 0.0)]
    if request.quantization not in (None, "gguf"):
        return found
    smallest = 0.97 * weights_on_device(spec, request).n_bytes
    for mixture in MIXTURES:
        size = weights_on_device(requantized(spec, mixture), request).n_bytes
        if size < smallest:
            smallest = size
            found.append((mixture, FILE_STEP_DISTANCE * len(found) + PERPLEXITY_LOSS[mixture]))
    return found


def _kv_types(request: PlanRequest) -> list[tuple[str, float]]:
    """Return (type, cost): the requested one and, if that is exact, those that save memory."""
    memory = engine_named(request.engine).memory
    unchanged = [(request.kv_dtype, 0.0)]
    if memory.kv_types[request.kv_dtype].added_perplexity:
        return unchanged
    smaller = memory.lossy_kv_types()
    return unchanged + [(name, KV_DISTANCE + KV_STEP_DISTANCE * index) for index, name in enumerate(smaller)]


def _fractions(request: PlanRequest) -> list[tuple[float | None, float]]:
    found: list[tuple[float | None, float]] = [(request.mem_fraction_static, 0.0)]
    if request.mem_fraction_static is not None and engine_named(request.engine).memory.has_memory_fraction:
        found.append((None, FRACTION_DISTANCE))
    return found


def _variants(spec: ModelSpec, card: Card, request: PlanRequest, weights: WeightsByPlacement) -> Iterator[_Variant]:
    """The same file and KV type, unchanged and with one other number changed."""
    yield {}, request, 0.0
    yield from _other_pools(spec, card, request, weights)
    if (shorter := longest_context(spec, card, request, weights)) and shorter < request.context_length:
        changed = replace(request, context_length=shorter)
        yield {"context_length": shorter}, changed, _shrinkage(request.context_length, shorter)
    chunk = request.chunked_prefill_tokens
    smaller = sorted((other for other in CHUNKS if other < chunk), reverse=True)
    yield from _first_that_fits(spec, card, request, weights, "chunked_prefill_tokens", smaller, CHUNK_WEIGHT)
    if not engine_named(request.engine).memory.shares_pool:
        fewer = list(range(request.max_running_requests - 1, 0, -1))
        yield from _first_that_fits(spec, card, request, weights, "max_running_requests", fewer, REQUESTS_WEIGHT)


def _other_pools(spec: ModelSpec, card: Card, request: PlanRequest, weights: WeightsByPlacement) -> Iterator[_Variant]:
    """Instead of a pool of a fixed size: the memory that the card has left, and just enough for one request."""
    if request.max_total_tokens is None and request.max_kv_bytes is None:
        return
    free = replace(request, max_total_tokens=None, max_kv_bytes=None)
    plan = make_plan(spec, card, free, weights)
    yield {"kv_cache.max_tokens": plan.kv_tokens}, replace(free, max_total_tokens=plan.kv_tokens), POOL_DISTANCE
    if request.max_kv_bytes is not None:
        n_bytes = engine_named(request.engine).memory.kv_bytes(spec, request, request.context_length)
        n_bytes = -(-n_bytes // 2**20) * 2**20
        yield {"kv_cache.max_bytes": n_bytes}, replace(free, max_kv_bytes=n_bytes), ONE_REQUEST_DISTANCE


def _first_that_fits(
    spec: ModelSpec,
    card: Card,
    request: PlanRequest,
    weights: WeightsByPlacement,
    key: str,
    values: list[int],
    weight: float,
) -> Iterator[_Variant]:
    """The first of some values of a setting that fits."""
    for value in values:
        setting: dict[str, Any] = {key: value}
        changed = replace(request, **setting)
        if make_plan(spec, card, changed, weights).fits:
            yield setting, changed, weight * _shrinkage(getattr(request, key), value)
            return


def longest_context(
    spec: ModelSpec,
    card: Card,
    request: PlanRequest,
    weights: WeightsByPlacement | None = None,
    *,
    all_at_once: bool = False,
) -> int | None:
    """Return the longest context that fits, in steps of CONTEXT_STEP, at most the model's; None if none fits.

    all_at_once: all requests together must have room for it, not only one.
    """
    weights = weights or WeightsByPlacement(spec)

    def fits(steps: int) -> bool:
        context = steps * CONTEXT_STEP
        changed = together(request, context) if all_at_once else replace(request, context_length=context)
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


def together(request: PlanRequest, context: int) -> PlanRequest:
    """Return the request with room for all of its requests at once, each of a whole context."""
    if not engine_named(request.engine).memory.shares_pool:
        return replace(request, context_length=context, max_total_tokens=None, max_kv_bytes=None)
    tokens = request.max_running_requests * context
    return replace(request, context_length=context, max_total_tokens=tokens, max_kv_bytes=None)


def _shrinkage(before: float, after: float) -> float:
    """0 for the same value, 1 for half, 3 for a quarter."""
    return before / after - 1


def _sentence(settings: dict[str, Any], plan: Plan) -> str:
    shown = settings | {key: format_bytes(value) for key, value in settings.items() if key == "kv_cache.max_bytes"}
    said = " and ".join(_WORDS[key].format(value) for key, value in shown.items())
    if any(key.startswith("placement.") for key in settings):
        said += f" ({plan.where})"
    return f"{said}: {plan.kv_tokens:,} tokens of KV cache, {plan.headroom_bytes / 2**20:,.0f} MiB to spare"
