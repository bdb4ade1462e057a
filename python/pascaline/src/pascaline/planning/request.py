"""The input of a plan: an engine's settings and the memory of the device on which it will run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.placement import Placement
    from pascaline.settings import Settings

EngineName = Literal["sglang", "llama.cpp"]
Device = Literal["cpu", "cuda"]

KV_DTYPE_OF = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Type of a KV pool if none is set: the type of the computation."""
KV_DTYPES: dict[str, tuple[str, ...]] = {
    "sglang": ("fp16", "bf16", "fp32", "fp8_e5m2", "int8"),
    "llama.cpp": ("fp16", "bf16", "int8"),
}
"""KV types of each engine. int8: SGLang has one fp16 scale per token and head, llama.cpp's q8_0 one per 32 values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Settings that determine memory, and the memory of the device. Bytes, tokens; None: the plan decides."""

    card_bytes: int
    """Memory of the device: for a GPU as the driver reports it, for a CPU the free memory of the host."""
    used_bytes: int = 0
    """Bytes that other processes use."""
    engine: EngineName = "sglang"
    device: Device = "cuda"
    dtype: str = "float16"
    """Type of the computation: float16, bfloat16 or float32."""
    context_length: int
    max_running_requests: int = 4
    kv_dtype: str = "fp16"
    """One of KV_DTYPES for the engine."""
    max_total_tokens: int | None = None
    """Tokens of the KV pool, all requests together."""
    max_kv_bytes: int | None = None
    """Bytes of the KV pool; at most one of this and max_total_tokens is set."""
    chunked_prefill_tokens: int = 512
    mem_fraction_static: float | None = None
    """Upper bound on the share of the device's memory for weights and KV pool."""
    prefill_bits: int | None = None
    decode_bits: int | None = None
    """Bits of activations, 8 or 16, in products with a GGUF file's matrices; None if there is no choice."""
    quantization: str | None = None
    """SGLang's quantisation method; bitsandbytes, and gguf on a CPU, change the memory of the weights."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        """Refuse a KV type that the engine does not have."""
        allowed = KV_DTYPES[self.engine]
        if self.kv_dtype not in allowed:
            raise ConfigurationError(
                f"kv_cache.dtype: {self.engine} has no {self.kv_dtype!r}, must be one of: {', '.join(allowed)}"
            )

    @property
    def available_bytes(self) -> int:
        """Bytes that other processes leave free."""
        return max(0, self.card_bytes - self.used_bytes)


WIDE_ENOUGH_FOR_8_BITS = 2048
"""Values per token (hidden_size) from which prompts have 8 bits: docs/results/activation-bits.md."""
MOST_REQUESTS_IN_16_BITS = 12
"""Requests that decode in 16 bits in the time of reading the weights, on cards with dp4a: docs/kernels.md."""


def activation_bits(settings: Settings, spec: ModelSpec, *, device: str) -> tuple[int | None, int | None]:
    """Return the bits of activations in prompts and decode steps, with auto decided; None if there is no choice.

    Raises ConfigurationError if bits are set for weights that are not multiplied as int8.
    """
    chosen = settings.activation_bits
    if settings.engine != "sglang":
        return None, None
    if spec.format != "gguf":
        for phase, bits in (("prefill", chosen.prefill), ("decode", chosen.decode)):
            if bits != "auto":
                raise ConfigurationError(
                    f"activation_bits.{phase}: {bits} applies to a GGUF file's weights, "
                    f"but the model's are {spec.format}; leave it out"
                )
        return None, None
    small = 8 if device == "cuda" and spec.hidden_size >= WIDE_ENOUGH_FOR_8_BITS else 16
    few = settings.max_running_requests <= MOST_REQUESTS_IN_16_BITS
    prefill = small if chosen.prefill == "auto" else chosen.prefill
    decode = (16 if few else small) if chosen.decode == "auto" else chosen.decode
    return prefill, decode


def request_from_settings(
    settings: Settings, spec: ModelSpec, *, device: str, dtype: str, card_bytes: int, used_bytes: int = 0
) -> PlanRequest:
    """Return the request of an instance. device and dtype are decided already: never auto.

    Raises ConfigurationError if neither settings nor model say how long a request may be, or if a model of this
    format cannot be quantised as the settings say.
    """
    _check_quantization(settings, spec)
    context_length = settings.context_length or spec.context_length
    if context_length < 1:
        raise ConfigurationError("context_length: the model names none, must be set to the tokens of a request")
    kv_dtype: str = settings.kv_cache.dtype
    if kv_dtype == "auto":
        # llama.cpp stores fp16 regardless of the type that it computes in.
        kv_dtype = "fp16" if settings.engine == "llama.cpp" else KV_DTYPE_OF[dtype]
    elif settings.engine == "sglang" and kv_dtype == "fp16":
        # Apart from fp8, int8 and bf16, SGLang's pools have the type of the computation.
        kv_dtype = KV_DTYPE_OF[dtype]
    prefill_bits, decode_bits = activation_bits(settings, spec, device=device)
    return PlanRequest(
        card_bytes=card_bytes,
        used_bytes=used_bytes,
        engine=settings.engine,
        device="cuda" if device == "cuda" else "cpu",
        dtype=dtype,
        context_length=context_length,
        max_running_requests=settings.max_running_requests,
        kv_dtype=kv_dtype,
        max_total_tokens=settings.kv_cache.max_tokens,
        max_kv_bytes=settings.kv_cache.max_bytes,
        chunked_prefill_tokens=settings.chunked_prefill_tokens,
        mem_fraction_static=settings.mem_fraction_static,
        prefill_bits=prefill_bits,
        decode_bits=decode_bits,
        quantization=settings.quantization,
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
    )


def _check_quantization(settings: Settings, spec: ModelSpec) -> None:
    """Refuse settings that SGLang would reject only while it loads the model."""
    formats = {"bitsandbytes": ("safetensors", "a Hugging Face folder's"), "gguf": ("gguf", "a GGUF file's")}
    method = settings.quantization if settings.engine == "sglang" else None
    if method in formats and spec.format != formats[method][0]:
        raise ConfigurationError(
            f"quantization: {method!r} applies to {formats[method][1]} weights, but the model's are {spec.format}; "
            "leave it out"
        )
