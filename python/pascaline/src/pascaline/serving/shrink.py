"""After the engine ran out of memory: the next smaller settings of the plan, for `on_oom = "shrink"`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pascaline.engines import Cause
from pascaline.planning.nearest import next_smaller

if TYPE_CHECKING:
    from pascaline.configuration import Configuration
    from pascaline.models.spec import ModelSpec
    from pascaline.planning import Plan
    from pascaline.planning.placement import Placement
    from pascaline.serving.failure import Ending
    from pascaline.settings import Settings

CHUNK = "chunked_prefill_tokens"


def helps(ending: Ending, device: str) -> bool:
    """Whether a smaller plan can help: the memory that ran out is the planned device's, and no leak used it up."""
    device_memory = ending.diagnosis is not None and ending.diagnosis.cause is Cause.DEVICE_MEMORY
    return ending.leak is None and (device_memory or device == "cpu")


def shrunk(
    configuration: Configuration, spec: ModelSpec, placement: Placement, plan: Plan
) -> tuple[Configuration, str] | None:
    """Return the configuration with the next smaller settings, and the change in words; None if nothing is smaller."""
    change = next_smaller(spec, placement.card, plan)
    if change is None:
        return None
    # The next plan may no longer choose it: that would undo the change.
    chunk = {CHUNK: plan.request.chunked_prefill_tokens}
    settings = with_values(configuration.settings, chunk | change.settings)
    origins = configuration.origins.with_origin(CHUNK, settings.chunked_prefill_tokens, "on_oom")
    return replace(configuration, settings=settings, origins=origins), change.sentence


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """Return the settings with other values: dotted key -> value. A pool in tokens replaces one in bytes."""
    pool = {key.removeprefix("kv_cache."): value for key, value in values.items() if key.startswith("kv_cache.")}
    if "max_tokens" in pool:
        pool["max_bytes"] = None
    update: dict[str, Any] = {key: value for key, value in values.items() if not key.startswith("kv_cache.")}
    if pool:
        update["kv_cache"] = settings.kv_cache.model_copy(update=pool)
    return settings.model_copy(update=update)
