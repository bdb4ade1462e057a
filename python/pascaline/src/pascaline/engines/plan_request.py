"""What a memory model is asked: an engine's settings and the memory of the device on which it will run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pascaline.defaults import SETTINGS
from pascaline.engines.speculation import NO_SPECULATION, Speculation

if TYPE_CHECKING:
    from pascaline.settings import Role

Device = Literal["cpu", "cuda"]
ALL_LAYERS = 999
"""More layers than any model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """How fast the host serves the weights that it holds while a GPU computes the rest. None: not known."""

    memory_bytes_per_second: float | None = None
    """Memory bandwidth of the CPUs that the engine uses."""
    cores: int | None = None
    """Cores that compute with what is read."""
    link_bytes_per_second: float | None = None
    """Rate at which pinned memory is copied to the GPU."""
    source: str = ""
    """Source of the first rate, for the reader of the plan."""


UNKNOWN_RATES = HostRates()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Settings that determine memory, and the memory of the device. Bytes, tokens; None: the plan decides."""

    card_bytes: int
    """Memory of the device: for a GPU as the driver reports it, for a CPU the free memory of the host."""
    used_bytes: int = 0
    """Bytes that other processes use."""
    engine: str = SETTINGS["engine"]
    """Name of the engine."""
    device: Device = "cuda"
    dtype: str = "float16"
    """Type of the computation: float16, bfloat16 or float32."""
    context_length: int
    max_running_requests: int = 4
    kv_dtype: str = "fp16"
    """One of the engine's types of a stored key or value."""
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
    role: Role = "generate"
    whole_prompts: bool = False
    """Whether the model needs a prompt in one step: an encoder, or a pooling over all of its tokens."""
    speculation: Speculation = NO_SPECULATION
    quantization: str | None = None
    """SGLang's quantisation method; bitsandbytes, and gguf on a CPU, change the memory of the weights."""
    expert_layers_on_host: int | None = 0
    """Number of first layers that keep their experts in the host's memory; None: as few as make the plan fit."""
    gpu_layers: int | None = ALL_LAYERS
    """Layers on the GPU with their KV cache, counted from the last one and with the output layer as one more; the
    others are on the host. None: as many as fit."""
    mapped: bool = False
    """Whether the host maps its weights from the file instead of holding them in memory."""
    locked: bool = False
    """Whether it maps them and locks them in memory."""
    host_memory_bytes: int | None = None
    """Free memory of the host; None: unknown, and not checked."""
    host_rates: HostRates = UNKNOWN_RATES
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def available_bytes(self) -> int:
        """Bytes that other processes leave free."""
        return max(0, self.card_bytes - self.used_bytes)
