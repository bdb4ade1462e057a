"""Engines behind one interface. A folder holds all that differs by engine; `engine_named` finds it.

base          how it is started, whether it makes progress, what its output means
memory_model  what it allocates for a model; plan_request, kv_layers, tensors: what the models share
data          engine.toml: constants and measured speeds
registry      finds the folders
load          what a running engine does, whichever it is
served        whether an engine serves a model
"""

from pascaline.defaults import SETTINGS
from pascaline.engines.base import Engine, Launch, Progress, Task, WorkLimits
from pascaline.engines.causes import Cause, Diagnosis
from pascaline.engines.registry import engine_named, engines
from pascaline.engines.series import Vitals

ENGINES = engines()
"""Every engine by its name in the setting `engine`."""
DEFAULT_ENGINE = SETTINGS["engine"]
"""Name of the engine if the settings are unknown."""

__all__ = [
    "DEFAULT_ENGINE",
    "ENGINES",
    "Cause",
    "Diagnosis",
    "Engine",
    "Launch",
    "Progress",
    "Task",
    "Vitals",
    "WorkLimits",
    "engine_named",
]
