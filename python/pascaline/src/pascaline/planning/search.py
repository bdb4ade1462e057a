"""Sweeps over one setting, and the best settings of all for a model and a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pascaline.engines import engine_named
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.errors import ConfigurationError
from pascaline.planning.hints import LARGE_CHUNK
from pascaline.planning.mixtures import MIXTURES, PERPLEXITY_LOSS, requantized
from pascaline.planning.nearest import CHUNKS, longest_context, together
from pascaline.planning.plan import Plan, make_plan
from pascaline.planning.speed import is_speed_known
from pascaline.planning.weights import WeightsByPlacement

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.cards import Card
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec

Goal = Literal["throughput", "latency", "context"]

LATENCY_PROMPT = 512
LATENCY_ANSWER = 128
"""Tokens of the request whose time `latency` minimises."""
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True, slots=True)
class Choice:
    """One combination of settings that fits, with its speed and quality."""

    file_type: str
    plan: Plan
    loss: float
    """Perplexity that quantisation adds, an indication (see PERPLEXITY_LOSS)."""
    latency_seconds: float | None
    """Time of a single request of LATENCY_PROMPT and LATENCY_ANSWER tokens; None if the card's speed is unknown."""

    @property
    def throughput(self) -> float | None:
        """Tokens per second, all requests together; None if the card's speed is unknown."""
        return self.plan.speed.decode.tokens_per_second if self.plan.speed else None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        request = self.plan.request
        return {
            "file_type": self.file_type,
            "kv_dtype": request.kv_dtype,
            "context_length": request.context_length,
            "max_running_requests": request.max_running_requests,
            "chunked_prefill_tokens": request.chunked_prefill_tokens,
            "where": self.plan.where,
            "expert_layers_on_host": request.expert_layers_on_host,
            "gpu_layers": None if request.gpu_layers == ALL_LAYERS else request.gpu_layers,
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
    room for their whole context at once. max_loss: choices that lose more are left out (of the file and the KV type).

    Raises ConfigurationError if the goal is a speed and the card's speed is unknown.
    """
    if goal != "context" and not is_speed_known(card, request):
        raise ConfigurationError(
            f"--optimize: the speed of {card.name} is not known, so nothing can be best for {goal}; "
            "name a GPU with --card, or take --optimize context"
        )
    choices = _choices(spec, card, request, goal, max_loss)
    ranked = sorted(choices, key=lambda choice: (*_scores(choice, goal), _nearness(choice, request)), reverse=True)
    return _pareto(ranked, goal)


def _choices(spec: ModelSpec, card: Card, request: PlanRequest, goal: Goal, max_loss: float) -> Iterator[Choice]:
    for mixture in MIXTURES:
        if PERPLEXITY_LOSS[mixture] > max_loss:
            continue
        model = requantized(spec, mixture)
        weights = WeightsByPlacement(model)
        for kv_dtype, kv_loss in _searched_kv_types(request):
            loss = PERPLEXITY_LOSS[mixture] + kv_loss
            if loss > max_loss:
                continue
            for chunk in _searched_chunks(request):
                base = replace(request, kv_dtype=kv_dtype, chunked_prefill_tokens=chunk)
                for plan in _plans(model, card, base, weights, goal):
                    yield Choice(mixture, plan, loss, latency_seconds(plan))


def _searched_chunks(request: PlanRequest) -> tuple[int, ...]:
    """Where weights may be on the host, a larger one copies them less often."""
    may_offload = request.expert_layers_on_host != 0 or request.gpu_layers != ALL_LAYERS
    return (*CHUNKS, LARGE_CHUNK) if may_offload else CHUNKS


def _searched_kv_types(request: PlanRequest) -> list[tuple[str, float]]:
    """Return (type, perplexity that it adds) of the requested one and of those that save memory."""
    types = engine_named(request.engine).memory.kv_types
    return [
        (name, kind.added_perplexity)
        for name, kind in types.items()
        if name == request.kv_dtype or kind.added_perplexity
    ]


def _plans(
    spec: ModelSpec, card: Card, request: PlanRequest, weights: WeightsByPlacement, goal: Goal
) -> Iterator[Plan]:
    """The plans of one file, KV type and chunk that fit, for every number of requests."""
    if goal == "context":
        longest = longest_context(spec, card, request, weights, all_at_once=True)
        if longest is not None:
            yield make_plan(spec, card, together(request, longest), weights)
        return
    for context in _contexts(spec, request):
        for n in REQUESTS if goal == "throughput" else (1,):
            wanted = replace(request, max_running_requests=n)
            plan = make_plan(spec, card, together(wanted, context), weights)
            if not plan.fits:
                break
            yield plan


def _contexts(spec: ModelSpec, request: PlanRequest) -> list[int]:
    """The request's context, and the model's or powers of two beyond it."""
    doubled = [request.context_length * 2**power for power in range(1, 8)]
    return [request.context_length, *(context for context in doubled if context <= spec.context_length)]


def latency_seconds(plan: Plan) -> float | None:
    """Return the time of one request of LATENCY_PROMPT and LATENCY_ANSWER tokens on an idle engine."""
    if plan.speed is None:
        return None
    return LATENCY_PROMPT / plan.speed.prefill.tokens_per_second + LATENCY_ANSWER / plan.speed.single.tokens_per_second


def _scores(choice: Choice, goal: Goal) -> tuple[float, float, float]:
    """Values to compare, larger is better, the goal first. Rounded, so that negligible differences count as equal."""
    context, quality = choice.plan.context_length, -choice.loss
    throughput = round(choice.throughput or 0.0, 1)
    if goal == "latency":
        return -round(choice.latency_seconds or 0.0, 2), context, quality
    if goal == "context":
        return context, throughput, quality
    return throughput, context, quality


def _nearness(choice: Choice, request: PlanRequest) -> float:
    return -abs(choice.plan.request.chunked_prefill_tokens - request.chunked_prefill_tokens)


def _pareto(ranked: list[Choice], goal: Goal) -> list[Choice]:
    """The choices that no other one equals or beats in everything; of equal ones the first."""
    kept: list[tuple[tuple[float, float, float], Choice]] = []
    for choice in ranked:
        scores = _scores(choice, goal)
        if not any(all(a >= b for a, b in zip(other, scores, strict=True)) for other, _ in kept):
            kept.append((scores, choice))
    return [choice for _, choice in kept]


def sweep(
    spec: ModelSpec, card: Card, request: PlanRequest, over: Literal["context", "requests", "quant"]
) -> list[Plan]:
    """Return the plans over a range of one setting, all others unchanged; a quantisation names its plan's model."""
    if over == "quant":
        found = []
        for mixture in MIXTURES:
            model = requantized(spec, mixture)
            found.append(replace(make_plan(model, card, request), model=mixture))
        return found
    weights = WeightsByPlacement(spec)
    if over == "requests":
        return [make_plan(spec, card, replace(request, max_running_requests=n), weights) for n in REQUESTS]
    most = max(spec.context_length, request.context_length)
    contexts = sorted({1024 * 2**power for power in range(10) if 1024 * 2**power <= most} | {request.context_length})
    return [make_plan(spec, card, replace(request, context_length=context), weights) for context in contexts]
