"""Memory budget and speed estimate of a model on a card: pure functions, no I/O.

    request = request_from_settings(settings, spec, device="cuda", dtype="float16", card_bytes=card.memory_bytes)
    plan = make_plan(spec, card, request)
    print(table(plan) if plan.fits else refusal(plan, nearest_fits(spec, card, request)))

request     what is to be planned           weights                      bytes of the weights, and what a step reads
plan        the parts together, a verdict   speed                        tokens per second, from measured points
mixtures    the model in another quant      nearest                      what would fit if a plan does not
search      sweeps, the best settings
report      the plan as text                picture                      the bar as SVG
"""

from pascaline.engines.memory_model import Part
from pascaline.planning.nearest import Change, nearest_fits, other_engine_fits
from pascaline.planning.plan import Plan, make_plan
from pascaline.planning.plan_text import refusal, table
from pascaline.planning.request import PlanRequest, request_from_settings

__all__ = [
    "Change",
    "Part",
    "Plan",
    "PlanRequest",
    "make_plan",
    "nearest_fits",
    "other_engine_fits",
    "refusal",
    "request_from_settings",
    "table",
]
