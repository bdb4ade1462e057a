"""Remarks on a plan that fits: settings that would serve the same model faster."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.planning.plan import make_plan

if TYPE_CHECKING:
    from pascaline.cards import Card
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.plan import Plan

LARGE_CHUNK = 2048
"""Every chunk of a prompt copies the experts that it uses, nearly all of them from a few hundred tokens on: 2048 tokens
were 2.5 times as fast as 512 (run 2026-11-29, Qwen3-30B-A3B)."""
LEAST_GAIN = 1.2


def with_hints(plan: Plan, spec: ModelSpec, card: Card, request: PlanRequest) -> Plan:
    """Return the plan with such a remark, if there is one. request: what the plan was made from."""
    larger = _with_larger_chunk(plan, spec, card, request)
    if larger is None or larger.speed is None or plan.speed is None:
        return plan
    prompts = (f"{speed.prefill.tokens_per_second:,.0f}" for speed in (larger.speed, plan.speed))
    answers = (f"{speed.single.tokens_per_second:,.0f}" for speed in (larger.speed, plan.speed))
    note = (
        f"chunked_prefill_tokens {LARGE_CHUNK} fits too and computes prompts at {' instead of '.join(prompts)} tok/s, "
        f"as each chunk copies the weights on the host; one request is answered at {' instead of '.join(answers)} tok/s"
    )
    return replace(plan, notes=(*plan.notes, note))


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
