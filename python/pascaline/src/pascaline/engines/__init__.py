"""Engines behind one interface. A folder holds all that differs by engine; `engine_named` finds it.

base          how it is started, whether it makes progress, what its output means
memory_model  what it allocates for a model; plan_request, kv_layers, tensors: what the models share
data          engine.toml: constants and measured speeds
registry      finds the folders
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.base import Engine, Launch, Progress, Task, Vitals, WorkLimits
from pascaline.engines.causes import Cause, Diagnosis
from pascaline.engines.registry import engine_named, engines

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec

ENGINES = engines()
"""Every engine by its name in the setting `engine`."""


def engine_for(spec: ModelSpec) -> Engine:
    """Return the engine to serve a model with: one that names its architecture, else one that decides itself."""
    by_certainty = sorted(ENGINES.values(), key=lambda engine: engine.decides_itself)
    return next((engine for engine in by_certainty if engine.knows(spec)), by_certainty[-1])


__all__ = [
    "ENGINES",
    "Cause",
    "Diagnosis",
    "Engine",
    "Launch",
    "Progress",
    "Task",
    "Vitals",
    "WorkLimits",
    "engine_for",
    "engine_named",
]
