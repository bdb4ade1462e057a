"""From settings and model to the task of an engine, which is everything that it is started with.

`planning.placement` decides where an instance runs; the functions that it asks about this host are named here.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.cards import installed_models
from pascaline.control_groups import usable_cpus
from pascaline.engines import Task, engine_named
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.errors import ConfigurationError, DoesNotFitError
from pascaline.gpu import host_bandwidth
from pascaline.gpu.devices import driver_gpus
from pascaline.gpu.memory import gpu_memory, host_memory, link_rate, node_cpus, numa_node, physical_cores, socket_nodes
from pascaline.models.cache import cache_folder
from pascaline.planning import Plan, make_plan, nearest_fits, other_engine_fits, refusal
from pascaline.planning import placement as placement_rules
from pascaline.planning.hints import with_hints
from pascaline.planning.placement import CPU_INFO, HostFacts, Placement, place
from pascaline.planning.request import request_from_placement
from pascaline.redaction import read_api_key

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.configuration import Configuration
    from pascaline.models.resolve import ResolvedModel
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings


def this_host(settings: Settings) -> HostFacts:
    """Return the functions that read facts about the machine that this process runs on."""
    return HostFacts(
        environment=os.environ,
        installed=installed_models,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        cpu_flags=cpu_flags,
        driver_gpus=driver_gpus,
        numa_node=numa_node,
        node_cpus=node_cpus,
        socket_nodes=socket_nodes,
        cores=lambda cpus: len(physical_cores(cpus)),
        cpus=lambda: frozenset(os.sched_getaffinity(0)),
        bandwidth=lambda: host_bandwidth.load(cache_folder(settings)),
        link_rate=link_rate,
    )


def place_instance(configuration: Configuration) -> Placement:
    """Decide where the instance runs on this host. Raises the errors of `placement.place`."""
    return place(configuration.settings, configuration.card, this_host(configuration.settings))


def plan_instance(configuration: Configuration, spec: ModelSpec, placement: Placement | None = None) -> Plan:
    """Plan the model on this host's device with the memory that is free now. placement: None means decide it here.

    Raises DoesNotFitError, with the table and the nearest settings that fit, unless allow_overcommit is set.
    """
    settings = configuration.settings
    placement = placement or place_instance(configuration)
    request = request_from_placement(settings, spec, placement)
    is_free = not configuration.origins.is_chosen("chunked_prefill_tokens")
    plan = make_plan(spec, placement.card, request)
    plan = with_hints(plan, spec, placement.card, request, chunk_is_free=is_free)
    if not plan.fits and not settings.allow_overcommit:
        changes = nearest_fits(spec, placement.card, request)
        changes += other_engine_fits(settings, spec, placement.card, request)
        raise DoesNotFitError(f"the plan does not fit: {plan.reasons[0]}\n\n{refusal(plan, changes)}")
    defaults = engine_named(settings.engine).judge_as(spec, settings.role).notes
    return replace(plan, notes=(*plan.notes, *defaults, *placement.notes))


def make_task(
    configuration: Configuration,
    model: ResolvedModel,
    plan: Plan,
    runtime_dir: Path,
    placement: Placement | None = None,
) -> Task:
    """Build the engine's task. placement: None means all visible GPUs, if the plan's device is a GPU."""
    request = plan.request
    # The plan may have chosen it.
    chunk = {"chunked_prefill_tokens": request.chunked_prefill_tokens}
    settings = configuration.settings.model_copy(update=chunk)
    cpus = placement.cpus if placement else frozenset()
    most = cpus or frozenset(os.sched_getaffinity(0))
    # Both threads of a core wait for the same memory when it holds experts.
    cores = len(physical_cores(most)) if len(plan.host_parts) > 1 else len(most)
    return Task(
        settings=settings,
        model=model,
        device=request.device,
        dtype=request.dtype,
        threads=settings.threads or min(usable_cpus(), cores),
        context_length=plan.context_length,
        max_total_tokens=plan.kv_tokens,
        mem_fraction_static=plan.mem_fraction_static,
        whole_prompts=request.whole_prompts,
        prefill_bits=request.prefill_bits or 16,
        decode_bits=request.decode_bits or 16,
        gpu_layers=request.gpu_layers or ALL_LAYERS,
        expert_layers_on_host=request.expert_layers_on_host or 0,
        prompt_cache_bytes=next((part.n_bytes for part in plan.host_parts if part.key == "host_prompts"), None),
        numa_node=placement.numa_node if placement else None,
        speculation=request.speculation,
        runtime_dir=runtime_dir,
        device_variables=placement.variables if placement else None,
        cpus=cpus,
        numa_nodes=len(host_bandwidth.usable_nodes(most)),
        api_key=_api_key(settings.api_key_file),
    )


def _api_key(path: Path | None) -> str | None:
    """Return the engine's key. Raises ConfigurationError if the file changed since it was checked and holds none."""
    try:
        return read_api_key(path) if path is not None else None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"api_key_file: no key in {path}: {error}") from error


def choose_dtype(settings: Settings, card: str | None, device: str) -> str:
    """Return the dtype of the computation on this host; see `placement.choose_dtype`."""
    return placement_rules.choose_dtype(settings, card, device, cpu_flags)


def cpu_flags(cpu_info: Path = CPU_INFO) -> frozenset[str]:
    """Return the instruction-set flags of this machine's first CPU; empty if they cannot be read."""
    try:
        return placement_rules.cpu_flags(cpu_info.read_text())
    except OSError:
        return frozenset()
