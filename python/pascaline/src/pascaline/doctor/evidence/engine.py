"""What the engine's program reports about itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.doctor.evidence.instance import json_object
from pascaline.doctor.host import EngineFacts, Instance

if TYPE_CHECKING:
    from pascaline.doctor.machine import Machine

PROBE = Path(__file__).parent.parent / "engine_probe.py"
PROBE_SECONDS = 120.0
"""Importing torch from a cold disk takes most of a minute."""


def collect_engine(machine: Machine, instance: Instance) -> EngineFacts:
    """Ask the Python that runs SGLang what is installed, or llama-server for its version."""
    settings = instance.settings
    if settings is not None and settings.engine == "llama.cpp":
        return _llama_server(machine, str(settings.engine_executable or "llama-server"))
    python = str(settings.engine_executable) if settings and settings.engine_executable else sys.executable
    variables = sorted(name for name in instance.environment if name.startswith(("SGLANG_", "SGL_")))
    output = machine.run("engine-probe", [python, str(PROBE), *variables], timeout=PROBE_SECONDS)
    if output is None:
        return EngineFacts(error=f"failed to run {python}: there is no such program")
    answer = json_object(output.text)
    if answer is None:
        last = next(reversed(output.errors.strip().splitlines()), f"exit code {output.code}")
        return EngineFacts(error=f"{python} gave no answer: {last}")
    return EngineFacts(
        error=str(answer.get("error", "")),
        versions=answer.get("versions", {}),
        torch_cuda=str(answer.get("torch_cuda", "")),
        torch_architectures=tuple(answer.get("torch_architectures", ())),
        supported_sglang=tuple(answer.get("supported_sglang", ())),
        kernel_architectures=tuple(answer.get("kernel_architectures", ())),
        kernel_formats=tuple(answer.get("kernel_formats", ())),
        entry_points=tuple(answer.get("entry_points", ())),
        unknown_variables=tuple(answer.get("unknown_variables", ())),
    )


def _llama_server(machine: Machine, program: str) -> EngineFacts:
    output = machine.run("llama-server", [program, "--version"])
    if output is None:
        return EngineFacts(error=f"failed to run {program}: there is no such program")
    match = re.search(r"^version: (.+)$", output.errors + output.text, re.MULTILINE)
    return EngineFacts(versions={"llama.cpp": match[1]}) if match else EngineFacts(error=f"{program} names no version")
