"""What the engine's program reports about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines import DEFAULT_ENGINE, engine_named
from pascaline.engines.installation import Installation

if TYPE_CHECKING:
    from pascaline.doctor.host import Instance
    from pascaline.doctor.machine import Machine


def collect_engine(machine: Machine, instance: Instance) -> Installation:
    """Ask the instance's engine what is installed."""
    settings = instance.settings
    engine = engine_named(settings.engine if settings else DEFAULT_ENGINE)
    variables = sorted(name for name in instance.environment if name.startswith(engine.variable_prefixes))
    probe = engine.probe(settings, variables)
    output = machine.run(probe.name, list(probe.command), timeout=probe.timeout_seconds)
    if output is None:
        return Installation(error=f"failed to run {probe.command[0]}: there is no such program")
    return engine.installation(probe, output.text, output.errors, output.code)
