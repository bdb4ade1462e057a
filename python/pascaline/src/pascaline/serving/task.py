"""What an engine is started with, decided from settings, model and host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cards import installed_models, load_card
from pascaline.engines import Task
from pascaline.errors import ConfigurationError
from pascaline.planning.kv_pool import pool_tokens

if TYPE_CHECKING:
    from pascaline.configuration import Configuration
    from pascaline.models.store import ResolvedModel
    from pascaline.settings import Settings

CPU_INFO = Path("/proc/cpuinfo")
# A pool that nobody gave a type stores what the computation produces.
_KV_DTYPE_OF = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def make_task(configuration: Configuration, model: ResolvedModel, runtime_dir: Path) -> Task:
    """Decide everything that was left to be decided."""
    settings = configuration.settings
    device = choose_device(settings)
    dtype = choose_dtype(settings, configuration.card, device)
    context_length = settings.context_length or model.spec.context_length
    kv_dtype = _KV_DTYPE_OF[dtype] if settings.kv_cache.dtype == "auto" else settings.kv_cache.dtype
    return Task(
        settings=settings,
        model=model,
        device=device,
        dtype=dtype,
        threads=settings.threads or len(os.sched_getaffinity(0)),
        context_length=context_length,
        max_total_tokens=pool_tokens(settings, model.spec, context_length, kv_dtype),
        mem_fraction_static=settings.mem_fraction_static,
        runtime_dir=runtime_dir,
        api_key=settings.api_key_file.read_text().strip() if settings.api_key_file else None,
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
