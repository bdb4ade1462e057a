"""llama.cpp's memory: weights as in the file, cells for a whole context of each request, one compute buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.engines.kv_layers import layer_groups
from pascaline.engines.llama_cpp import speculation
from pascaline.engines.llama_cpp.host_caches import FREE_PARTS, checkpoint_bytes, checkpoints, prompt_cache_bytes
from pascaline.engines.llama_cpp.offload import (
    candidates,
    device_bytes,
    expert_layers,
    host_bytes,
    is_offloading,
    is_on_host,
    layers_on_host,
)
from pascaline.engines.llama_cpp.pool import HALF_BYTES, kernel_pool
from pascaline.engines.llama_cpp.states import recurrent_bytes
from pascaline.engines.memory_model import HeldTensor, MemoryModel, Part, Pool
from pascaline.engines.plan_request import ALL_LAYERS
from pascaline.engines.tensors import is_embedding, padded
from pascaline.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.cards import Card
    from pascaline.engines.kv_layers import KvType
    from pascaline.engines.memory_model import Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.engines.speculation import Speculation
    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.settings import Settings

CELLS = 256
"""It rounds the cells of a sequence up to this (llama-context.cpp, GGML_PAD(n_ctx, 256))."""
LEAST_BATCH = 32
"""Least --batch-size (common.h)."""
VECTORS, INNER_VECTORS = 5, 3
"""Vectors of the hidden and of the intermediate size that are alive at once in a layer, as its log shows."""
SMALL_TENSORS_BYTES = 2**20
"""Inputs and alignment in its graph buffer: up to half of this in the log."""
HOST_PROCESS_BYTES = 272 * 2**20
"""Memory of the process on the host beside its buffers: CUDA's libraries, the driver's own pinned memory (10 MiB) and
the kernel's. Three servers on a GPU were charged 249 to 305 MiB beyond their buffers, driver 580
(docs/results/placement.md)."""
PINNED_SHARE = 16 / 4096
"""Page tables of pinned memory: 8 bytes for each page of 4 KiB in the page tables, and 8 in the driver's list."""
CARD_PAGE_BYTES, PAGE_BYTES = 9, 4096
"""Page tables that a GPU keeps in its own memory to reach pinned memory of the host: an entry of 8 bytes for each page,
and the tables above. Servers with 0.9 to 40.2 GiB pinned took 2.19 MiB of the card for each GiB
(docs/results/placement.md)."""
WIDE_HEAD, WIDE_HEAD_BYTES = 256, 16
"""Heads of at least this size need these bytes for each token of a batch and each cell: the buffer of flash attention
on a GPU, estimated by the log of one model."""


class LlamaCppMemory(MemoryModel):
    """The memory model of llama-server."""

    weights_source = ""
    pool_source = "llama.cpp, src/llama-kv-cache.cpp and llama-kv-cache-iswa.cpp"
    has_memory_fraction = False
    shares_pool = False

    def kv_dtype(self, chosen: str, dtype: str) -> str:
        """It stores fp16 regardless of the type that it computes in."""
        del dtype
        return "fp16" if chosen == "auto" else chosen

    def speculation(self, settings: Settings, spec: ModelSpec, *, device: str, decode_bits: int | None) -> Speculation:
        """Its own methods; this reads the header of the draft model."""
        del device, decode_bits
        return speculation.speculation(settings, spec)

    def static_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights, pool: Pool) -> list[Part]:
        """Return weights and KV cache, and those of what drafts."""
        parts = super().static_parts(spec, request, weights, pool)
        if request.speculation.draft is not None:
            parts.append(self._draft_model(request.speculation.draft, request))
        elif request.speculation.method == "mtp":
            n_bytes = pool.n_bytes // max(1, spec.num_hidden_layers)
            text = f"KV cache of one layer: {pool.n_bytes:,} B / {spec.num_hidden_layers} layers"
            parts.append(Part("draft", "draft heads", n_bytes, text, "estimated", "llama.cpp, --spec-type draft-mtp"))
        return parts

    def _draft_model(self, draft: ModelSpec, request: PlanRequest) -> Part:
        """A second model with a KV cache of as many tokens and a compute buffer of its own."""
        tied = not any(tensor.name == "output.weight" for tensor in draft.tensors)
        tensors = [self.held(tensor, draft, request, tied=tied) for tensor in draft.tensors]
        n_weights = sum(tensor.n_bytes for tensor in tensors if tensor.on_device)
        n_kv, batch = self.pool_of(draft, request).n_bytes, physical_batch(request)
        n_buffer = batch * (draft.vocab_size + draft.hidden_size) * 4
        text = f"weights {n_weights:,} B + KV cache {n_kv:,} B + compute buffer {n_buffer:,} B"
        return Part("draft", "draft model", n_weights + n_kv + n_buffer, text, "estimated", "as the model's own parts")

    def activation_columns(self, bits: int | None) -> int:
        """It always multiplies activations of 8 bits."""
        del bits
        return 1

    def held(self, tensor: TensorSpec, spec: ModelSpec, request: PlanRequest, *, tied: bool) -> HeldTensor:
        """As in the file. It looks tokens up on the CPU and puts a second copy of a tied matrix on the GPU."""
        on_host = is_on_host(tensor.name, spec, request)
        on_device = not on_host or (tied and is_embedding(tensor.name))
        n_bytes = device_bytes(tensor) if on_device and request.device == "cuda" else host_bytes(tensor)
        return HeldTensor(tensor.tensor_type, n_bytes, on_device=on_device, on_host=on_host)

    def candidates(self, spec: ModelSpec, request: PlanRequest) -> list[PlanRequest]:
        """Experts, and layers, of as few layers as possible in the host's memory."""
        return candidates(spec, request)

    def pool(self, spec: ModelSpec, request: PlanRequest, weights: Weights, dynamic: Sequence[Part]) -> Pool:
        """Return its cache, which depends on nothing else that is on the device."""
        del weights, dynamic
        return self.pool_of(spec, request)

    def pool_of(self, spec: ModelSpec, request: PlanRequest) -> Pool:
        """Return its cache, which always has cells for the whole context of each request.

        Sliding-window layers keep the window and one batch (llama-kv-cache-iswa.cpp), recurrent layers a state for each
        request.
        """
        return self._pool(_without_layers(spec, range(layers_on_host(spec, request))), request)

    def _pool(self, spec: ModelSpec, request: PlanRequest) -> Pool:
        n, kind = request.max_running_requests, self.kv_types[request.kv_dtype]
        cells, window = _cells(spec, request)
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
        """Its graph buffer: the peak is a layer's MLP of a full batch, or the logits of one token of each request.

        Prompts multiply with the host's weights on the GPU too, and the buffer holds the largest of these then.
        """
        batch, inner = physical_batch(request), _inner(spec)
        n_bytes = batch * (inner + VECTORS * spec.hidden_size + _state_vectors(spec)) * 4
        text = f"batch of {batch} x (MLP {inner:,} + {VECTORS} x hidden {spec.hidden_size:,}"
        text += f" + states {_state_vectors(spec):,}) x 4 B" if _state_vectors(spec) else ") x 4 B"
        mask = _mask_bytes(spec, request)
        text += f" + mask {mask:,} B"
        if request.device == "cuda" and spec.head_dim >= WIDE_HEAD:
            wide = batch * padded(request.context_length, CELLS) * WIDE_HEAD_BYTES
            mask += wide
            text += f" + attention of wide heads {wide:,} B"
        if copies := _half_precision_bytes(spec, request, self.kv_types[request.kv_dtype]):
            mask += copies
            text += f" + keys and values of a layer in half precision {copies:,} B"
        logits = _logits_bytes(spec, request)
        if logits > n_bytes + mask:
            n_bytes, mask, text = logits, 0, f"logits of {request.max_running_requests} x {spec.vocab_size:,} x 4 B"
        # One at a time (ggml-backend.cpp; on for batches of 32 tokens and more).
        copied = weights.host_largest_matrix_bytes
        if copied:
            inputs = batch * spec.hidden_size * 4
            text += f" + largest matrix on the host {copied:,} B and its inputs {inputs:,} B"
            copied += inputs
        source = "llama-server's own log of its compute buffers (tests/planning/test_llama_cpp_log.py)"
        n_bytes += mask + copied + SMALL_TENSORS_BYTES
        return [Part("activations", "compute buffer", n_bytes, f"{text} + 1 MiB", "measured", source)]

    def dynamic_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights, card: Card) -> list[Part]:
        """The graph buffer, what kernels take from their pool while they run, and the constants."""
        buffers, *constants = super().dynamic_parts(spec, request, weights, card)
        if request.device != "cuda":
            return [buffers, *constants]
        cells, _ = _cells(spec, request)
        pool = kernel_pool(spec, physical_batch(request), card, cells=cells, sequences=request.max_running_requests)
        return [buffers, pool, *self._page_tables(spec, request, weights), *constants]

    def _page_tables(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """What the card keeps to reach the host's part, if that is pinned."""
        if not is_offloading(spec, request) or request.mapped or request.locked:
            return []
        pinned = sum(part.n_bytes for part in self._host_buffers(spec, request, weights))
        pages = pinned // PAGE_BYTES
        text = f"{CARD_PAGE_BYTES} B for each of {pages:,} pages of the host's memory that are pinned"
        source = "servers with 1 to 40 GiB pinned (docs/results/placement.md)"
        return [Part("page_tables", "page tables", pages * CARD_PAGE_BYTES, text, "measured", source)]

    def host_parts(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """Weights, KV cache of whole layers there, and the buffers beside them."""
        if not is_offloading(spec, request):
            return super().host_parts(spec, request, weights)
        parts = self._host_buffers(spec, request, weights)
        parts.append(_process(request, sum(part.n_bytes for part in parts)))
        return [*parts, *self._host_caches(spec, request, parts)]

    def _host_buffers(self, spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
        """The buffers that its log names, all pinned unless the weights are mapped."""
        layers = layers_on_host(spec, request)
        on_host = self._pool(_without_layers(spec, range(layers, spec.num_hidden_layers)), request)
        batch, kv_bytes = physical_batch(request), on_host.n_bytes if layers else 0
        compute = batch * 2 * spec.hidden_size * 4 + _mask_bytes(spec, request) + SMALL_TENSORS_BYTES
        how = "mapped from the file" if request.mapped or request.locked else "pinned"
        how += " and locked" if request.locked else ""
        source = "llama-server's own log"
        return [
            Part("host_weights", "weights", weights.host_bytes, f"sum over the tensors there, {how}", "exact"),
            Part("host_kv", "KV cache", kv_bytes, on_host.formula if kv_bytes else "all on the GPU", "exact"),
            Part(
                "host_output",
                "logits",
                _logits_bytes(spec, request),
                f"{request.max_running_requests} requests x vocabulary {spec.vocab_size:,} x 4 B",
                "measured",
                source,
            ),
            Part(
                "host_compute",
                "compute buffer",
                compute,
                f"batch of {batch} x 2 x hidden {spec.hidden_size:,} x 4 B + mask + 1 MiB",
                "measured",
                source,
            ),
        ]

    def _host_caches(self, spec: ModelSpec, request: PlanRequest, others: Sequence[Part]) -> list[Part]:
        """What it keeps of prompts, beside the other parts of the host's memory."""
        states = checkpoint_bytes(spec, request, self.kv_types[request.kv_dtype])
        n, source = request.max_running_requests, "llama.cpp, common.h"
        text = f"{n} requests x {checkpoints(request.context_length)} checkpoints of states and windows"
        held = [Part("host_checkpoints", "checkpoints", states, text, "estimated", source)] if states else []
        needed = sum(part.n_bytes for part in (*others, *held) if not (request.mapped and part.key == "host_weights"))
        limit = prompt_cache_bytes(request.host_memory_bytes, needed)
        text = f"limit of prompts that are kept: at most 8 GiB and 1/{FREE_PARTS} of what is free beside the rest"
        return [*held, Part("host_prompts", "kept prompts", limit, text, "exact", source)]

    def notes(self, spec: ModelSpec, request: PlanRequest) -> list[str]:
        """Flags that depend on the build of llama-server and on the host, so that only its start decides them."""
        if not is_offloading(spec, request):
            return []
        held = "" if request.mapped else f" --load-mode {'mmap+mlock' if request.locked else 'none'},"
        return [
            f"llama-server also gets, as far as its build has them: --fit off,{held} --cache-ram and --ctx-checkpoints "
            "as the host's memory allows, --numa on a host with several nodes"
        ]

    def check(self, settings: Settings, spec: ModelSpec) -> None:
        """Refuse to keep experts on the host that the model does not have."""
        experts = settings.placement.experts
        if experts not in ("auto", "gpu", 0) and not (spec.num_experts and expert_layers(spec)):
            raise ConfigurationError(
                f"placement.experts: {experts!r} is set, but {spec.architecture} is no mixture of experts; "
                "leave it out, or set placement.layers"
            )
        if isinstance(experts, int) and experts > spec.num_hidden_layers:
            raise ConfigurationError(
                f"placement.experts: {experts} is more layers than the model has, "
                f"must be at most {spec.num_hidden_layers}"
            )
        layers = settings.placement.layers
        if isinstance(layers, int) and layers > spec.num_hidden_layers:
            raise ConfigurationError(
                f"placement.layers: {layers} is more than the model has, must be at most {spec.num_hidden_layers}"
            )

    def arguments(self, request: PlanRequest, kv_tokens: int, fraction: float | None) -> tuple[str, ...]:
        """Return the flags that determine memory."""
        del kv_tokens, fraction
        return memory_arguments(
            context_length=request.context_length,
            max_running_requests=request.max_running_requests,
            chunked_prefill_tokens=request.chunked_prefill_tokens,
            device=request.device,
            kv_flag=self.kv_types[request.kv_dtype].flag,
            whole_prompts=request.whole_prompts,
            gpu_layers=request.gpu_layers or ALL_LAYERS,
            expert_layers_on_host=request.expert_layers_on_host or 0,
        )


def memory_arguments(
    *,
    context_length: int,
    max_running_requests: int,
    chunked_prefill_tokens: int,
    device: str,
    kv_flag: str,
    gpu_layers: int = ALL_LAYERS,
    expert_layers_on_host: int = 0,
    whole_prompts: bool = False,
) -> tuple[str, ...]:
    """Return the flags that determine memory. llama-server divides its context among the parallel requests.

    whole_prompts: as in PlanRequest; it refuses a prompt that is longer than its physical batch then.
    """
    batch = str(context_length if whole_prompts else max(chunked_prefill_tokens, LEAST_BATCH))
    experts = ("--n-cpu-moe", str(expert_layers_on_host)) if expert_layers_on_host else ()
    return (
        *("--ctx-size", str(context_length * max_running_requests), "--parallel", str(max_running_requests)),
        *("--batch-size", batch, "--ubatch-size", batch),
        *("--n-gpu-layers", str(gpu_layers if device == "cuda" else 0), *experts),
        *("--cache-type-k", kv_flag, "--cache-type-v", kv_flag),
    )


def _process(request: PlanRequest, n_buffers: int) -> Part:
    """Return what the process takes on the host beside its buffers, which have `n_buffers` bytes."""
    pages = 0 if request.mapped or request.locked else int(n_buffers * PINNED_SHARE)
    text = f"{HOST_PROCESS_BYTES:,} B + {pages:,} B of page tables for pinned memory"
    source = "control groups of llama-server (docs/results/placement.md)"
    return Part("host_process", "process", HOST_PROCESS_BYTES + pages, text, "measured", source)


def physical_batch(request: PlanRequest) -> int:
    """Return the tokens of one graph: chunked_prefill_tokens, or a whole prompt."""
    if request.whole_prompts:
        return request.context_length
    return max(request.chunked_prefill_tokens, LEAST_BATCH)


def _cells(spec: ModelSpec, request: PlanRequest) -> tuple[int, int]:
    """Return the cells of a request in layers with full attention, and in those with a sliding window."""
    cells = padded(request.context_length, CELLS)
    return cells, min(cells, padded((spec.sliding_window or 0) + physical_batch(request), CELLS))


def _without_layers(spec: ModelSpec, layers: range) -> ModelSpec:
    """Return the model as if these layers had no KV cache."""
    if not len(layers):
        return spec
    heads = spec.layer_kv_heads or (spec.num_kv_heads,) * spec.num_hidden_layers
    kept = tuple(0 if layer in layers else count for layer, count in enumerate(heads))
    return replace(spec, layer_kv_heads=kept)


def _inner(spec: ModelSpec) -> int:
    """Return the values of a token that are alive at the peak of an MLP: gate, up and their product."""
    dense = INNER_VECTORS * spec.intermediate_size
    if not spec.num_experts:
        return dense
    used = spec.num_experts_per_token or 1
    experts = used * (INNER_VECTORS * (spec.moe_intermediate_size or spec.intermediate_size) + spec.hidden_size)
    return max(dense, experts) if spec.moe_intermediate_size else experts


def _state_vectors(spec: ModelSpec) -> int:
    """Return the values of a token in a recurrent layer: input and output of its convolution and state, estimated."""
    return 4 * (spec.ssm_inner_size or 0)


def _mask_bytes(spec: ModelSpec, request: PlanRequest) -> int:
    """Return the bytes of the attention masks: half precision, one for the layers with full attention, and one for
    those with a sliding window."""
    cells, window = _cells(spec, request)
    masks = (cells, window) if spec.sliding_window and spec.sliding_layers else (cells,)
    return physical_batch(request) * 2 * sum(masks)


def _half_precision_bytes(spec: ModelSpec, request: PlanRequest, kind: KvType) -> int:
    """Return the bytes of the half-precision copies that attention makes on a GPU of another KV type.

    One layer's keys and values of all requests at once, since a batch may hold tokens of each (fattn.cu,
    ggml_cuda_flash_attn_ext_get_alloc_size; Pascal computes prompts by its tile kernel, which needs them).
    """
    if request.device != "cuda" or kind.flag == "f16":
        return 0
    cells, window = _cells(spec, request)
    held = (
        (window if group.sliding and spec.sliding_window else cells) * group.heads * (group.head_dim + group.v_head_dim)
        for group in layer_groups(spec)
    )
    return request.max_running_requests * max(held, default=0) * HALF_BYTES


def _logits_bytes(spec: ModelSpec, request: PlanRequest) -> int:
    """Return the bytes of the logits: one token of each request (server-context.cpp, server_output_limits)."""
    return request.max_running_requests * spec.vocab_size * 4
