"""What an engine is started with, decided from settings, model and host."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cards import card_for_device, detect_card, installed_models, load_card, unknown_card
from pascaline.control_groups import usable_cpus
from pascaline.engines import Task
from pascaline.errors import ConfigurationError, DoesNotFitError, MissingError
from pascaline.gpu.memory import DeviceMemory, gpu_memory, host_memory
from pascaline.planning import Plan, make_plan, nearest_fits, refusal, request_from_settings
from pascaline.redaction import read_secret

if TYPE_CHECKING:
    from pascaline.cards import Card
    from pascaline.configuration import Configuration
    from pascaline.models.spec import ModelSpec
    from pascaline.models.store import ResolvedModel
    from pascaline.settings import Settings

CPU_INFO = Path("/proc/cpuinfo")


def plan_instance(configuration: Configuration, spec: ModelSpec) -> Plan:
    """Plan the model on this host's device with the memory that is free now.

    Raises DoesNotFitError, with the table and the nearest settings that fit, unless allow_overcommit is set.
    """
    settings = configuration.settings
    device = choose_device(settings)
    dtype = choose_dtype(settings, configuration.card, device)
    card, memory, doubt = local_device(settings, device)
    request = request_from_settings(
        settings, spec, device=device, dtype=dtype, card_bytes=memory.total_bytes, used_bytes=memory.used_bytes
    )
    plan = make_plan(spec, card, request)
    if not plan.fits and not settings.allow_overcommit:
        changes = nearest_fits(spec, card, request)
        raise DoesNotFitError(f"the plan does not fit: {plan.reasons[0]}\n\n{refusal(plan, changes)}")
    return replace(plan, notes=(*plan.notes, doubt)) if doubt else plan


def local_device(settings: Settings, device: str) -> tuple[Card, DeviceMemory, str | None]:
    """Return what the model is to run on, its memory, and why that is in doubt (None: it is not).

    It is the GPU that the engine will see, or the host. Where NVML fails but the card is known, its profile stands in:
    an instance is not to stay down because of a reading that it can do without.
    """
    if device == "cpu":
        return load_card("cpu"), host_memory(), None
    visible = settings.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    try:
        memory = gpu_memory(visible)
    except MissingError as error:
        name = settings.card or detect_card()
        if name is None or not load_card(name).memory_bytes:
            raise
        card = load_card(name)
        return card, DeviceMemory(name, card.memory_bytes), f"planned as if nothing else used the card: {error}"
    return card_for_device(memory.name) or unknown_card(memory.name, memory.total_bytes), memory, None


def make_task(configuration: Configuration, model: ResolvedModel, plan: Plan, runtime_dir: Path) -> Task:
    """Put together what the engine is started with."""
    settings, request = configuration.settings, plan.request
    return Task(
        settings=settings,
        model=model,
        device=request.device,
        dtype=request.dtype,
        threads=settings.threads or usable_cpus(),
        context_length=plan.context_length,
        max_total_tokens=plan.kv_tokens,
        mem_fraction_static=plan.mem_fraction_static,
        runtime_dir=runtime_dir,
        api_key=read_secret(settings.api_key_file) if settings.api_key_file else None,
    )


def choose_device(settings: Settings) -> str:
    """Return cpu or cuda. A card profile means its GPU: where that is missing, it is an error, no slow success."""
    if settings.device == "auto":
        return "cuda" if installed_models() else "cpu"
    if settings.device == "cuda" and not installed_models():
        raise ConfigurationError(
            "device: cuda is wanted, but the NVIDIA driver shows no GPU; check nvidia-smi, or set device to cpu"
        )
    return settings.device


def choose_dtype(settings: Settings, card: str | None, device: str) -> str:
    """Return the type of the computation: float16 on a GPU, bfloat16 on a CPU that multiplies it, else float32."""
    if settings.dtype != "auto":
        if settings.dtype == "bfloat16" and device == "cuda" and card and load_card(card).compute_capability:
            raise ConfigurationError(f"dtype: bfloat16 is emulated on {card}, must be one of: float16, float32")
        return settings.dtype
    if device == "cuda":
        return "float16"
    return "bfloat16" if cpu_flags() & {"avx512_bf16", "amx_bf16"} else "float32"


def cpu_flags(cpu_info: Path = CPU_INFO) -> frozenset[str]:
    """Return the instruction-set flags of the first CPU; empty where they cannot be read."""
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
