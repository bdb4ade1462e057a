"""llama.cpp's memory: weights as in the file, cells for a whole context of each request, one compute buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pascaline.engines.kv_layers import KvType, layer_groups
from pascaline.engines.llama_cpp.states import recurrent_bytes
from pascaline.engines.memory_model import HeldTensor, MemoryModel, Part, Pool
from pascaline.engines.tensors import is_embedding, padded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pascaline.engines.memory_model import Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec, TensorSpec

ENGINE_KV_TYPES = {"auto": "f16", "fp16": "f16", "bf16": "bf16", "int8": "q8_0"}
"""Our names of KV cache types -> llama.cpp's."""
Q8_0_BYTES = 34 / 32
"""Its int8: blocks of 32 values with one fp16 scale (ggml-common.h, block_q8_0)."""
CELLS = 256
"""It rounds the cells of a sequence up to this (llama-context.cpp, GGML_PAD(n_ctx, 256))."""
LEAST_BATCH, MOST_BATCH = 32, 512
"""Least --batch-size, and its default of the physical batch (common.h, n_ubatch)."""
CPU_VECTORS = 5
"""Hidden vectors beside the logits in its buffer on the CPU, as its log shows for six models."""
ALL_LAYERS = 999
"""Value of --n-gpu-layers for all layers of any model."""


class LlamaCppMemory(MemoryModel):
    """The memory model of llama-server."""

    kv_types: ClassVar[Mapping[str, KvType]] = {
        "fp16": KvType(2.0),
        "bf16": KvType(2.0),
        "int8": KvType(Q8_0_BYTES),
    }
    weights_source = ""
    pool_source = "llama.cpp, src/llama-kv-cache.cpp and llama-kv-cache-iswa.cpp"
    has_memory_fraction = False
    shares_pool = False

    def kv_dtype(self, chosen: str, dtype: str) -> str:
        """It stores fp16 regardless of the type that it computes in."""
        del dtype
        return "fp16" if chosen == "auto" else chosen

    def activation_columns(self, bits: int | None) -> int:
        """It always multiplies activations of 8 bits."""
        del bits
        return 1

    def held(self, tensor: TensorSpec, spec: ModelSpec, request: PlanRequest, *, tied: bool) -> HeldTensor:
        """As in the file. It looks tokens up on the CPU and puts a second copy of a tied matrix on the GPU."""
        del spec
        on_host = is_embedding(tensor.name) and request.device == "cuda"
        return HeldTensor(tensor.tensor_type, tensor.n_bytes, on_device=tied or not on_host, on_host=on_host)

    def pool(self, spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: Sequence[Part]) -> Pool:
        """Return its cache, which depends on nothing else that is on the device."""
        del weights, dynamic
        return self.pool_of(spec, request)

    def pool_of(self, spec: ModelSpec, request: PlanRequest) -> Pool:
        """Return its cache, which always has cells for the whole context of each request.

        Sliding-window layers keep the window and one batch (llama-kv-cache-iswa.cpp), recurrent layers a state for each
        request.
        """
        n, batch, kind = request.max_running_requests, physical_batch(request), self.kv_types[request.kv_dtype]
        cells = padded(request.context_length, CELLS)
        window = min(cells, padded((spec.sliding_window or 0) + batch, CELLS))
        total, words = 0.0, []
        for group in layer_groups(spec):
            own = window if group.sliding and spec.sliding_window else cells
            total += n * own * group.token_bytes(kind)
            words.append(f"{own:,} cells x {group.words(kind)}")
        states = recurrent_bytes(spec) * n
        if states:
            words.append(f"{recurrent_bytes(spec):,} B of recurrent state")
        text = f"{n} requests x ({' + '.join(words)})" if words else "an encoder keeps no keys and values"
        return Pool(n * cells, round(total) + states, text)

    def buffers(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """Its graph buffer: the peak is the output layer of a full batch, logits beside the hidden vectors.

        On the CPU the input of the last layer and the attention mask are in the same buffer.
        """
        del weights
        batch = physical_batch(request)
        vectors = 1 if request.device == "cuda" else CPU_VECTORS
        n_bytes = batch * (spec.vocab_size + vectors * spec.hidden_size) * 4
        text = f"batch of {batch} x (vocabulary {spec.vocab_size:,} + {vectors} x hidden {spec.hidden_size:,}) x 4 B"
        if request.device == "cpu":
            n_bytes += batch * request.context_length * 4
            text += f" + mask {batch} x {request.context_length:,} x 4 B"
        source = "llama.cpp's own log of its compute buffers (benchmarks/plan_compare.py)"
        return [Part("activations", "compute buffer", n_bytes, text, "measured", source)]

    def arguments(self, request: PlanRequest, kv_tokens: int, fraction: float | None) -> tuple[str, ...]:
        """Return the flags that determine memory."""
        del kv_tokens, fraction
        return memory_arguments(
            context_length=request.context_length,
            max_running_requests=request.max_running_requests,
            chunked_prefill_tokens=request.chunked_prefill_tokens,
            device=request.device,
            kv_dtype=request.kv_dtype,
            whole_prompts=request.whole_prompts,
        )


def memory_arguments(
    *,
    context_length: int,
    max_running_requests: int,
    chunked_prefill_tokens: int,
    device: str,
    kv_dtype: str,
    whole_prompts: bool = False,
) -> tuple[str, ...]:
    """Return the flags that determine memory. llama-server divides its context among the parallel requests.

    whole_prompts: as in PlanRequest; it refuses a prompt that is longer than its physical batch then.
    """
    physical = ("--ubatch-size", str(context_length)) if whole_prompts else ()
    batch = context_length if whole_prompts else max(chunked_prefill_tokens, LEAST_BATCH)
    kind = ENGINE_KV_TYPES[kv_dtype]
    return (
        *("--ctx-size", str(context_length * max_running_requests), "--parallel", str(max_running_requests)),
        *("--batch-size", str(batch), *physical),
        *("--n-gpu-layers", str(ALL_LAYERS if device == "cuda" else 0)),
        *("--cache-type-k", kind, "--cache-type-v", kind),
    )


def physical_batch(request: PlanRequest) -> int:
    """Return the tokens of one graph: chunked_prefill_tokens, at most the default of 512, or a whole prompt."""
    if request.whole_prompts:
        return request.context_length
    return min(MOST_BATCH, max(request.chunked_prefill_tokens, LEAST_BATCH))
