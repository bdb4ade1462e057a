"""Engines behind one interface: command line, environment, progress counters, what their words mean."""

from pascaline.engines.base import Engine, Launch, Progress, Task, WorkLimits
from pascaline.engines.causes import Cause, Diagnosis
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.engines.sglang import SglangEngine

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (SglangEngine(), LlamaCppEngine())}
"""Every engine by the name that the setting `engine` gives it."""

__all__ = ["ENGINES", "Cause", "Diagnosis", "Engine", "Launch", "Progress", "Task", "WorkLimits"]
