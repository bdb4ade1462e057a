"""What the Python that runs SGLang has installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.engines.client import json_object
from pascaline.engines.installation import Installation, Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.settings import Settings

PROBE = Path(__file__).parent / "probe.py"
PROBE_SECONDS = 120.0
"""Importing torch from a cold disk takes most of a minute."""


def probe(settings: Settings | None, variables: Sequence[str]) -> Probe:
    """Return the command that asks; it also searches SGLang's source for these variables."""
    python = str(settings.engine_executable) if settings and settings.engine_executable else sys.executable
    return Probe("engine-probe", (python, str(PROBE), *variables), PROBE_SECONDS)


def read_probe(probe: Probe, text: str, errors: str, code: int) -> Installation:
    """Read its answer. text, errors: what it wrote to stdout and stderr; code: its exit status."""
    try:
        answer = json_object(text.encode(errors="replace"))
    except ConnectionError:
        last = next(reversed(errors.strip().splitlines()), f"exit code {code}")
        return Installation(error=f"{probe.command[0]} gave no answer: {last}")
    return Installation(
        error=str(answer.get("error", "")),
        versions=answer.get("versions", {}),
        torch_cuda=str(answer.get("torch_cuda", "")),
        torch_architectures=tuple(answer.get("torch_architectures", ())),
        library_code={name: tuple(code) for name, code in answer.get("library_code", {}).items()},
        runs=answer.get("runs", {}),
        supported=tuple(answer.get("supported_sglang", ())),
        kernel_architectures=tuple(answer.get("kernel_architectures", ())),
        kernel_formats=tuple(answer.get("kernel_formats", ())),
        entry_points=tuple(answer.get("entry_points", ())),
        unknown_variables=tuple(answer.get("unknown_variables", ())),
    )
