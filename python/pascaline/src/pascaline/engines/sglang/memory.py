"""SGLang's memory: weights as the plugin holds them, a KV pool that all requests share, tables, working memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.engines.kv_layers import layer_groups
from pascaline.engines.memory_model import MemoryModel, Part, Pool
from pascaline.engines.sglang import activations, speculation, weights
from pascaline.engines.sglang.buffers import buffers, draft_buffers, recorded_steps, tables
from pascaline.engines.tensors import padded
from pascaline.errors import ConfigurationError
from pascaline.plugin import PLUGIN
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.engines.data import KvTypeEntry
    from pascaline.engines.kv_layers import KvType
    from pascaline.engines.memory_model import HeldTensor, Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.engines.speculation import Speculation
    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.settings import Settings

AUTO = "auto"
"""SGLang's KV type that is the type of the computation; the setting has the same name for it."""
PADDING_TOKENS = 1
"""SGLang's pool has one more page (of one token) for padded rows (mem_cache/memory_pool.py, MHATokenToKVPool)."""
COMPUTED_BYTES = 1
"""Of each slot: whether a draft model's keys and values are those of its token (sglang_pascal, speculation)."""
CPU_POOL_BYTES = 2**30
"""KV cache on the CPU if no size is set: small compared with a host's memory, and enough for a few requests."""
MAX_FRACTION = 0.98
"""Highest mem_fraction_static that is passed on: some memory must stay free for what no plan includes."""
RESIDENT_FIRST = ("context", "process")
"""Parts that exist before SGLang measures the free memory; its memory fraction is a share of the rest."""
STATIC = frozenset({"weights", "kv_pool", "tables", "rounding", "draft"})
"""Parts that its memory fraction limits."""
ALLOCATION_STEP = 2 * 2**20
"""torch's CUDA allocator takes memory for tensors from LARGE_TENSOR on in these steps (CUDACachingAllocator.cpp)."""
LARGE_TENSOR = 10 * 2**20
QUANTIZATION_FORMATS = {
    "bitsandbytes": ("safetensors", "a Hugging Face folder's"),
    "gguf": ("gguf", "a GGUF file's"),
}
"""Method -> the model format that it applies to, and whose weights these are."""


class SglangMemory(MemoryModel):
    """The memory model of SGLang with sglang-pascal."""

    weights_source = weights.SOURCE
    pool_source = "SGLang, mem_cache/memory_pool.py, MHATokenToKVPool"
    has_memory_fraction = True
    shares_pool = True

    def kv_type(self, entry: KvTypeEntry) -> KvType:
        """Return a type with the bytes that the plugin's pools have."""
        assert entry.pool is not None, f"{entry} names no pool of the plugin"
        own = PLUGIN.kv_types[entry.pool]
        sized = replace(entry, value_bytes=float(own.element_bytes))
        return replace(super().kv_type(sized), scale_bytes=2 * own.scale_bytes)

    def kv_dtype(self, chosen: str, dtype: str) -> str:
        """A pool whose flag is SGLang's auto, and one that is not chosen, has the type of the computation."""
        if chosen != AUTO and self.kv_types[chosen].flag != AUTO:
            return chosen
        return next(name for name, entry in self.data.kv_types.items() if entry.pool == dtype)

    def kv_flag(self, chosen: str, dtype: str) -> str:
        """What is not chosen is SGLang's own choice."""
        del dtype
        return AUTO if chosen == AUTO else self.kv_types[chosen].flag

    def activation_bits(self, settings: Settings, spec: ModelSpec, *, device: str) -> tuple[int | None, int | None]:
        """Return the bits that the plugin multiplies with."""
        return activations.activation_bits(settings, spec, device=device)

    def speculation(self, settings: Settings, spec: ModelSpec, *, device: str, decode_bits: int | None) -> Speculation:
        """Prompt lookup or a draft model, on one device; this reads the header of the draft model."""
        columns = self.activation_columns(decode_bits) if decode_bits and device == "cuda" else 1
        n_bytes = sum(tensor.n_bytes for tensor in spec.tensors)
        draft = speculation.draft_model(settings, spec)
        return speculation.speculation(settings, device=device, n_bytes=n_bytes, columns=columns, draft=draft)

    def check(self, settings: Settings, spec: ModelSpec) -> None:
        """Refuse a quantisation method for a model of another format."""
        method = settings.quantization
        wanted, whose = QUANTIZATION_FORMATS.get(method or "", (spec.format, ""))
        if spec.format != wanted:
            raise ConfigurationError(
                f"quantization: {method!r} applies to {whose} weights, but the model's are {spec.format}; leave it out"
            )

    def activation_columns(self, bits: int | None) -> int:
        """An activation of 16 bits is two int8."""
        return (bits or 16) // 8

    def held(self, tensor: TensorSpec, spec: ModelSpec, request: PlanRequest, *, tied: bool) -> HeldTensor | None:
        """Return how the plugin holds it: on the device, like everything that it loads."""
        del tied
        return weights.held_tensor(tensor, spec, request)

    def rounding_bytes(self, n_bytes: int) -> int:
        """Return what torch's CUDA allocator takes beyond a tensor's bytes."""
        return padded(n_bytes, ALLOCATION_STEP) - n_bytes if n_bytes >= LARGE_TENSOR else 0

    def pool(self, spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: Sequence[Part]) -> Pool:
        """The pool of the configured size; else room for every request, or what fits, and at least one request."""
        if request.max_total_tokens is not None:
            return self.pool_of(spec, request, request.max_total_tokens)
        if request.max_kv_bytes is not None:
            return self.pool_of(spec, request, self._tokens(spec, request, request.max_kv_bytes))
        without_pool = self.static_parts(spec, request, weights, Pool(0, 0, ""))
        room = _room(request, [*without_pool, *dynamic])
        if request.device == "cpu":
            room = min(room, CPU_POOL_BYTES)
        # An embedding's prompt leaves the pool at once: what one of them needs serves many that are shorter.
        prompts = request.max_running_requests if request.role == "generate" else 1
        longest = request.context_length + speculation.reserved_tokens(request.speculation)
        wanted = prompts * longest
        tokens = max(longest, min(wanted, self._tokens(spec, request, max(0, room), with_draft=True)))
        return self.pool_of(spec, request, tokens)

    def pool_of(self, spec: ModelSpec, request: PlanRequest, tokens: int) -> Pool:
        """Return the pool of these tokens.

        Layers with a sliding window take as much as the others: SGLang has its second, smaller pool for other
        families than those that the plugin serves (configs/model_config.py, is_hybrid_swa_model).
        """
        groups = layer_groups(
            spec, tensor_parallel=request.tensor_parallel, pipeline_parallel=request.pipeline_parallel
        )
        per_token, kind = self.kv_bytes_per_token(spec, request), self.kv_types[request.kv_dtype]
        words = " + ".join(group.words(kind) for group in groups) or "no layer has a KV cache"
        text = f"({tokens:,} tokens + {PADDING_TOKENS} of padding) x {per_token:,} B; one token: {words}"
        return Pool(tokens, (tokens + PADDING_TOKENS) * per_token, text)

    def _tokens(self, spec: ModelSpec, request: PlanRequest, n_bytes: int, *, with_draft: bool = False) -> int:
        """How many tokens a pool of at most these bytes holds. with_draft: the draft model's is within the bytes."""
        per_token = self.kv_bytes_per_token(spec, request)
        if with_draft and request.speculation.draft is not None:
            per_token += self.kv_bytes_per_token(request.speculation.draft, request) + COMPUTED_BYTES
        return max(0, n_bytes // per_token - PADDING_TOKENS) if per_token else request.context_length

    def kv_bytes(self, spec: ModelSpec, request: PlanRequest, tokens: int) -> int:
        """Return the bytes of the smallest pool that holds these tokens."""
        return (tokens + PADDING_TOKENS) * self.kv_bytes_per_token(spec, request)

    def static_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights, pool: Pool) -> list[Part]:
        """Return weights, pool, tables and what the allocator rounds up; mem_fraction_static limits the sum."""
        parts = [*super().static_parts(spec, request, weights, pool), tables(spec, request)]
        if request.speculation.draft is not None:
            parts.append(self._draft_model(request.speculation.draft, request, pool))
        if weights.rounding_bytes and request.device == "cuda":
            parts.append(
                Part(
                    "rounding",
                    "allocator rounding",
                    weights.rounding_bytes,
                    "each tensor of 10 MiB or more rounded up to 2 MiB",
                    "estimated",
                    "torch, c10/cuda/CUDACachingAllocator.cpp",
                )
            )
        return parts

    def _draft_model(self, draft: ModelSpec, request: PlanRequest, pool: Pool) -> Part:
        """A second model on the same device: its weights, keys and values in the same slots, tables and logits."""
        held = [weights.held_tensor(tensor, draft, request) for tensor in draft.tensors]
        sizes = [each.n_bytes for each in held if each is not None]
        if request.device == "cuda":
            sizes = [size + self.rounding_bytes(size) for size in sizes]
        per_token = self.kv_bytes_per_token(draft, request) + COMPUTED_BYTES
        n_kv = (pool.tokens + PADDING_TOKENS) * per_token
        others = draft_buffers(draft, request)
        text = (
            f"weights {sum(sizes):,} B + KV cache ({pool.tokens:,} tokens + {PADDING_TOKENS}) x {per_token:,} B"
            f" + tables and logits {others:,} B"
        )
        return Part("draft", "draft model", sum(sizes) + n_kv + others, text, "estimated", "as the model's own parts")

    def buffers(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """Return what it allocates while requests run."""
        return buffers(spec, request, weights)

    def constant(self, key: str, n_bytes: int, request: PlanRequest) -> tuple[int, str] | None:
        """A CUDA graph is recorded for each batch size, and with speculation for each number of rows."""
        if key != "graphs_bytes":
            return None
        if request.role != "generate":
            return 0, "none: graphs are recorded for decode steps"
        count = recorded_steps(request)
        return count * n_bytes, f"{count} recorded steps x {format_bytes(n_bytes)}"

    def fraction(self, request: PlanRequest, parts: Sequence[Part]) -> float:
        """The share passed to SGLang: the configured value, or all except half of what the dynamic parts need.

        --max-total-tokens already limits the pool; the fraction must not limit it further.
        """
        if request.mem_fraction_static is not None:
            return request.mem_fraction_static
        base = _base(request, parts)
        if base <= 0:
            return MAX_FRACTION
        slack = sum(part.n_bytes for part in parts) - _static_bytes(parts) - (request.available_bytes - base)
        needed = _static_bytes(parts) / base
        return min(MAX_FRACTION, max(math.ceil(needed * 1000) / 1000, math.floor((1 - slack / 2 / base) * 1000) / 1000))

    def reasons(self, request: PlanRequest, parts: Sequence[Part]) -> list[str]:
        """Refuse static parts beyond the configured share."""
        if request.mem_fraction_static is None:
            return []
        allowed, needed = int(request.mem_fraction_static * _base(request, parts)), _static_bytes(parts)
        if needed <= allowed:
            return []
        return [
            f"mem_fraction_static: {request.mem_fraction_static:g} leaves {format_bytes(max(0, allowed))} for "
            f"weights and KV cache, {format_bytes(needed)} are needed"
        ]

    def notes(self, spec: ModelSpec, request: PlanRequest) -> list[str]:
        """Name the matrix types without kernels."""
        return weights.expanded(spec, request)

    def arguments(self, request: PlanRequest, kv_tokens: int, fraction: float | None) -> tuple[str, ...]:
        """Return the flags that determine memory."""
        return (
            *("--context-length", str(request.context_length)),
            *("--max-running-requests", str(request.max_running_requests)),
            *("--max-total-tokens", str(kv_tokens)),
            *("--chunked-prefill-size", str(request.chunked_prefill_tokens)),
            *("--mem-fraction-static", f"{fraction:g}"),
            *("--kv-cache-dtype", self.kv_types[request.kv_dtype].flag),
            *speculation.arguments(request.speculation),
        )


def _base(request: PlanRequest, parts: Sequence[Part]) -> int:
    """Memory that SGLang finds free before it loads the model: its mem_fraction_static is a share of this."""
    return request.available_bytes - sum(part.n_bytes for part in parts if part.key in RESIDENT_FIRST)


def _static_bytes(parts: Sequence[Part]) -> int:
    return sum(part.n_bytes for part in parts if part.key in STATIC)


def _room(request: PlanRequest, parts: Sequence[Part]) -> int:
    """Bytes that these parts leave for the pool."""
    room = request.available_bytes - sum(part.n_bytes for part in parts)
    if request.mem_fraction_static is not None:
        room = min(room, int(request.mem_fraction_static * _base(request, parts)) - _static_bytes(parts))
    return room
