"""The plan of the instance's model on this host's card."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.cards import load_card
from pascaline.doctor.evidence.instance import UNIT_PREFIX
from pascaline.errors import MissingError, PascalineError
from pascaline.gpu.memory import DeviceMemory, memory_of_visible
from pascaline.planning.placement import HostFacts, place
from pascaline.planning.plan import make_plan
from pascaline.planning.request import request_from_placement

if TYPE_CHECKING:
    from pascaline.doctor.host import Gpu, Host
    from pascaline.planning.plan import Plan


def make_host_plan(host: Host) -> tuple[Plan | None, str, str]:
    """Plan the model as `serve` would run it on this host: (plan, why there is none, refusal).

    A refusal is the planner's reason why these settings cannot serve this model. Without one, a fact is unknown.
    """
    settings, spec, configuration = host.settings, host.model.spec, host.instance.configuration
    if settings is None or spec is None or configuration is None:
        return None, "", ""
    try:
        placement = place(settings, configuration.card, facts_of(host))
        return make_plan(spec, placement.card, request_from_placement(settings, spec, placement)), "", ""
    except MissingError as error:
        return None, str(error), ""
    except PascalineError as error:
        return None, "", str(error)


def facts_of(host: Host) -> HostFacts:
    """Return the facts that the placement needs, from what was collected.

    Without a driver, the profile of the configured card takes the place of the GPU, to see whether the model would fit.
    """

    def installed() -> list[str]:
        names = [gpu.name.removeprefix("NVIDIA ") for gpu in host.gpus if gpu.reading.values]
        card = host.instance.configuration.card if host.instance.configuration else None
        return names or list(host.driver.models) or list(load_card(card).nvml_names[:1] if card else ())

    return HostFacts(
        environment=host.instance.environment,
        installed=installed,
        gpu_memory=lambda visible: _gpu_memory(host, visible),
        host_memory=lambda: _host_memory(host),
        cpu_flags=lambda: host.system.cpu_flags,
        bandwidth=lambda: host.memory.bandwidth,
    )


def _gpu_memory(host: Host, visible: str | None) -> DeviceMemory:
    """Return the memory of the first visible GPU; memory that the instance itself holds counts as free."""
    if host.nvml is None:
        raise MissingError("no driver is loaded")
    found = memory_of_visible(host.nvml, visible)
    ours = sum(_held_by_us(gpu) for gpu in host.gpus if gpu.reading.uuid == found.gpus[0].uuid)
    return replace(found, used_bytes=max(0, found.used_bytes - ours))


def _held_by_us(gpu: Gpu) -> int:
    return sum(process.bytes or 0 for process in gpu.processes if process.unit.startswith(UNIT_PREFIX))


def _host_memory(host: Host) -> DeviceMemory:
    limits = [host.system.memory.get("MemAvailable", 0), *filter(None, [host.system.memory_limit])]
    return DeviceMemory("cpu", min(limits))
