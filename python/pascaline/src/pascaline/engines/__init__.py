"""Engines behind one interface: command line, environment, progress counters, the meaning of their output."""

from pascaline.engines.base import Engine, Launch, Progress, Task, WorkLimits
from pascaline.engines.causes import Cause, Diagnosis
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.engines.sglang import SglangEngine

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (SglangEngine(), LlamaCppEngine())}
"""Every engine by its name in the setting `engine`."""

__all__ = ["ENGINES", "Cause", "Diagnosis", "Engine", "Launch", "Progress", "Task", "WorkLimits"]
