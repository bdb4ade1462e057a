"""Settings that serve the same model faster: used if the user has not set them, otherwise named in a remark."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.planning.plan import make_plan
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.cards import Card
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.plan import Plan

LARGE_CHUNK = 2048
"""Every chunk of a prompt copies the experts that it uses, nearly all of them from a few hundred tokens on: 2048 tokens
were 2.5 times as fast as 512 (run 2026-11-29, Qwen3-30B-A3B)."""
LEAST_GAIN = 1.2


MOST_LOSS = 0.95
"""Least part of the speed of one request's answer that a chunk which nobody has set may leave: it also moves weights
to the host."""


def with_hints(plan: Plan, spec: ModelSpec, card: Card, request: PlanRequest, *, chunk_is_free: bool = False) -> Plan:
    """Return the plan with a remark about a larger chunk, or with that chunk, if prompts are faster then.

    Another remark says how little is left beside an estimated CUDA context. request: as the plan was asked for.
    chunk_is_free: whether its chunk is a default.
    """
    return _with_doubt(_with_chunk_hint(plan, spec, card, request, chunk_is_free=chunk_is_free))


def _with_doubt(plan: Plan) -> Plan:
    """Weights are moved to the host until the rest just fits: an estimate that is too small would end the start."""
    estimated = sum(part.n_bytes for part in plan.parts if part.key == "context" and part.origin == "estimated")
    if not plan.fits or len(plan.host_parts) < 2 or plan.headroom_bytes >= estimated:
        return plan
    note = (
        f"the CUDA context is estimated as {format_bytes(estimated)}, since no Pascal card was measured, and "
        f"{format_bytes(plan.headroom_bytes)} are left beside it; if the engine runs out of memory at its start, put "
        f"more than the {plan.where} (placement.experts, placement.layers)"
    )
    return replace(plan, notes=(*plan.notes, note))


def _with_chunk_hint(plan: Plan, spec: ModelSpec, card: Card, request: PlanRequest, *, chunk_is_free: bool) -> Plan:
    larger = _with_larger_chunk(plan, spec, card, request)
    if larger is None or larger.speed is None or plan.speed is None:
        return plan
    prompts = (f"{speed.prefill.tokens_per_second:,.0f}" for speed in (larger.speed, plan.speed))
    new, old = (f"{speed.single.tokens_per_second:,.0f}" for speed in (larger.speed, plan.speed))
    answers = "as fast" if new == old else f"at {new} instead of {old} tok/s"
    taken = chunk_is_free and _answer_share(larger, plan) >= MOST_LOSS
    what = f"chunked_prefill_tokens {LARGE_CHUNK}"
    what += ", as none is set, computes" if taken else " fits too and computes"
    note = (
        f"{what} prompts at {' instead of '.join(prompts)} tok/s, as each chunk copies the weights on the host; "
        f"one request is answered {answers}"
    )
    return replace(larger if taken else plan, notes=(*(larger if taken else plan).notes, note))


def _answer_share(larger: Plan, plan: Plan) -> float:
    assert larger.speed is not None
    assert plan.speed is not None
    return larger.speed.single.tokens_per_second / plan.speed.single.tokens_per_second


def _with_larger_chunk(plan: Plan, spec: ModelSpec, card: Card, request: PlanRequest) -> Plan | None:
    """Return the plan with the large chunk if it fits and prompts are faster by LEAST_GAIN."""
    if not plan.fits or plan.speed is None or len(plan.host_parts) < 2 or request.whole_prompts:
        return None
    if not request.chunked_prefill_tokens < LARGE_CHUNK <= request.context_length:
        return None
    larger = make_plan(spec, card, replace(request, chunked_prefill_tokens=LARGE_CHUNK))
    if not larger.fits or larger.speed is None:
        return None
    gain = larger.speed.prefill.tokens_per_second / plan.speed.prefill.tokens_per_second
    return larger if gain >= LEAST_GAIN else None
