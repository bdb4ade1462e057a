"""Collects a Host from a machine, part by part. A part that fails does not stop the others."""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from pascaline.doctor.evidence.driver import collect_driver, collect_gpu, find_libcuda, nvcc_release
from pascaline.doctor.evidence.engine import collect_engine
from pascaline.doctor.evidence.instance import Question, collect_instance
from pascaline.doctor.evidence.logs import collect_logs
from pascaline.doctor.evidence.memory import collect_memory
from pascaline.doctor.evidence.model import collect_model
from pascaline.doctor.evidence.plan import make_host_plan
from pascaline.doctor.evidence.system import collect_system
from pascaline.doctor.host import Driver, Host, HostMemory, Instance, Logs, ModelFacts, System
from pascaline.engines.installation import Installation

if TYPE_CHECKING:
    from collections.abc import Callable

    from pascaline.doctor.machine import Machine
    from pascaline.planning.plan import Plan

__all__ = ["Question", "collect"]


def collect(machine: Machine, question: Question, on_part: Callable[[str], None] = lambda _: None) -> Host:
    """Collect everything; `on_part` is called with the name of each part before it is read."""
    on_part("instance")
    instance = collect_instance(machine, question)
    _note_settings(machine, instance)
    on_part("driver")
    driver = _collected(machine, "driver", lambda: collect_driver(machine), Driver())
    reading = machine.reading() if driver.version or driver.pci or driver.nodes else None
    devices = reading.devices if reading else ()
    on_part("engine")
    engine = _collected(machine, "engine", lambda: collect_engine(machine, instance), Installation())
    on_part("model")
    model = _collected(machine, "model", lambda: collect_model(machine, instance.settings), ModelFacts())
    on_part("system")
    host = Host(
        driver=driver,
        nvml=reading,
        gpus=_collected(machine, "GPUs", lambda: tuple(collect_gpu(machine, device) for device in devices), ()),
        libcuda=find_libcuda(machine, instance.environment),
        nvcc=nvcc_release(machine),
        system=_collected(machine, "system", lambda: collect_system(machine, instance), System()),
        memory=_collected(machine, "memory", lambda: collect_memory(machine, instance), HostMemory()),
        engine=engine,
        model=model,
        instance=instance,
        logs=_collected(machine, "logs", lambda: collect_logs(machine, instance.name), Logs()),
    )
    no_plan: tuple[Plan | None, str, str] = (None, "the planner failed; pascaline doctor --report shows why", "")
    plan, plan_error, plan_refusal = _collected(machine, "plan", lambda: make_host_plan(host), no_plan)
    return replace(host, plan=plan, plan_error=plan_error, plan_refusal=plan_refusal)


Part = TypeVar("Part")


def _collected(machine: Machine, name: str, collect_part: Callable[[], Part], nothing: Part) -> Part:
    """Return a part, or `nothing` if its collector fails unexpectedly: the other parts must still be reported."""
    try:
        return collect_part()
    except Exception:
        machine.transcript.append((f"failed to collect: {name}", traceback.format_exc()))
        return nothing


# Variables that an engine, its libraries or this program read. Any other variable may hold a secret.
_TOLD_VARIABLE = re.compile(
    r"(?:CUDA|NVIDIA|NVML|NCCL|SGLANG|SGL|PASCALINE|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|LLAMA|GGML|HF|TRANSFORMERS"
    r"|OMP|MKL|PYTHON|LD|LC|XDG)_\w*|(?:CACHE|STATE|RUNTIME|LOGS|CONFIGURATION)_DIRECTORY"
    r"|PATH|PYTHON\w*|HOME|TMPDIR|LANG|VIRTUAL_ENV"
)


def _note_settings(machine: Machine, instance: Instance) -> None:
    """Keep the instance's settings and variables for the report; variables that no engine reads by name only."""
    variables = sorted(instance.environment.items())
    lines = [f"{name}={value}" for name, value in variables if _TOLD_VARIABLE.fullmatch(name)]
    others = [name for name, _ in variables if not _TOLD_VARIABLE.fullmatch(name)]
    lines += [f"(set, and not the engine's: {', '.join(others)})"] if others else []
    machine.transcript.append((f"environment of {instance.environment_source}", "\n".join(lines)))
    if instance.configuration is not None:
        document = instance.configuration.settings.model_dump_json(indent=1)
        machine.transcript.append(
            ("settings", f"{document}\n{json.dumps(dict(instance.configuration.origins), indent=1)}")
        )
