"""The input of a plan, from the settings and the placement of an instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines import engine_named
from pascaline.engines.plan_request import ALL_LAYERS, UNKNOWN_RATES, HostRates, PlanRequest
from pascaline.errors import ConfigurationError
from pascaline.models.roles import LAST

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.placement import Placement
    from pascaline.settings import Settings

__all__ = ["HostRates", "PlanRequest", "request_from_placement", "request_from_settings"]


def request_from_settings(
    settings: Settings,
    spec: ModelSpec,
    *,
    device: str,
    dtype: str,
    card_bytes: int,
    used_bytes: int = 0,
    host_memory_bytes: int | None = None,
    host_rates: HostRates = UNKNOWN_RATES,
) -> PlanRequest:
    """Return the request of an instance. device and dtype are decided already: never auto.

    Raises ConfigurationError if neither settings nor model say how long a request may be, or if a model of this
    format cannot be quantised as the settings say.
    """
    engine = engine_named(settings.engine).memory
    engine.check(settings, spec)
    context_length = settings.context_length or spec.context_length
    if context_length < 1:
        raise ConfigurationError("context_length: the model names none, must be set to the tokens of a request")
    prefill_bits, decode_bits = engine.activation_bits(settings, spec, device=device)
    return PlanRequest(
        card_bytes=card_bytes,
        used_bytes=used_bytes,
        engine=settings.engine,
        device="cuda" if device == "cuda" else "cpu",
        dtype=dtype,
        context_length=context_length,
        max_running_requests=settings.max_running_requests,
        kv_dtype=engine.kv_dtype(settings.kv_cache.dtype, dtype),
        max_total_tokens=settings.kv_cache.max_tokens,
        max_kv_bytes=settings.kv_cache.max_bytes,
        chunked_prefill_tokens=settings.chunked_prefill_tokens,
        mem_fraction_static=settings.mem_fraction_static,
        prefill_bits=prefill_bits,
        decode_bits=decode_bits,
        role=settings.role,
        whole_prompts=settings.role != "generate" and (not spec.causal or spec.pooling not in (None, LAST)),
        speculation=engine.speculation(settings, spec, device=device, decode_bits=decode_bits),
        quantization=settings.quantization,
        expert_layers_on_host=_expert_layers(settings, spec),
        gpu_layers=_gpu_layers(settings, spec),
        mapped=settings.placement.weights == "mapped",
        locked=settings.placement.weights == "locked",
        host_memory_bytes=host_memory_bytes,
        host_rates=host_rates,
        tensor_parallel=settings.tensor_parallel,
        pipeline_parallel=settings.pipeline_parallel,
    )


def request_from_placement(settings: Settings, spec: ModelSpec, placement: Placement) -> PlanRequest:
    """Return the request of an instance that runs there; errors as of `request_from_settings`."""
    return request_from_settings(
        settings,
        spec,
        device=placement.device,
        dtype=placement.dtype,
        card_bytes=placement.memory.total_bytes,
        used_bytes=placement.memory.used_bytes,
        host_memory_bytes=placement.host_memory_bytes,
        host_rates=placement.host_rates,
    )


def _expert_layers(settings: Settings, spec: ModelSpec) -> int | None:
    chosen = settings.placement.experts
    if isinstance(chosen, int):
        return chosen
    return {"auto": None, "gpu": 0, "cpu": spec.num_hidden_layers}[chosen]


def _gpu_layers(settings: Settings, spec: ModelSpec) -> int | None:
    chosen = settings.placement.layers
    if isinstance(chosen, int):
        return spec.num_hidden_layers + 1 - chosen if chosen else ALL_LAYERS
    return None if chosen == "auto" else ALL_LAYERS
