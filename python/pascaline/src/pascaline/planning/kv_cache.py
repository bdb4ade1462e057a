"""Size of the KV cache: bytes of one token, and of a pool of tokens, as each engine allocates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.models.spec import ModelSpec
    from pascaline.planning.request import PlanRequest

_KV_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp8_e5m2": "fp8_e5m2", "int8": "int8"}
ELEMENT_BYTES = {name: float(PLUGIN.kv_types[kind].element_bytes) for name, kind in _KV_TYPES.items()}
SCALE_BYTES = PLUGIN.kv_types["int8"].scale_bytes
"""SGLang's int8 pool of sglang-pascal keeps one fp16 scale per token and KV head, for keys and for values."""
Q8_0_BYTES = 34 / 32
"""llama.cpp's int8: blocks of 32 values with one fp16 scale (ggml-common.h, block_q8_0)."""
PADDING_TOKENS = 1
"""SGLang's pool has one more page (of one token) for padded rows (mem_cache/memory_pool.py, MHATokenToKVPool)."""
STATE_ELEMENT_BYTES = 4
"""llama.cpp keeps recurrent states in fp32 (llama-model.cpp, create_memory)."""
TOKEN_SHIFTS = 2
"""RWKV's default of token_shift_count (llama-model.cpp)."""
LLAMA_CELLS = 256
"""llama.cpp rounds the cells of a sequence up to this (llama-context.cpp, GGML_PAD(n_ctx, 256))."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that store the same number of values per token: how many layers, and the values of one token in one."""

    layers: int
    heads: int
    head_dim: int
    v_head_dim: int
    sliding: bool

    def token_bytes(self, engine: str, dtype: str) -> float:
        """Bytes of one token in all these layers."""
        values = self.heads * (self.head_dim + self.v_head_dim)
        if engine == "llama.cpp" and dtype == "int8":
            return self.layers * values * Q8_0_BYTES
        scales = 2 * SCALE_BYTES * self.heads if dtype == "int8" else 0
        return self.layers * (values * ELEMENT_BYTES[dtype] + scales)

    def words(self, engine: str, dtype: str) -> str:
        """The calculation of one token."""
        size = f"{Q8_0_BYTES:g}" if engine == "llama.cpp" and dtype == "int8" else f"{ELEMENT_BYTES[dtype]:g}"
        dims = f"2 x {self.head_dim}" if self.head_dim == self.v_head_dim else f"({self.head_dim} + {self.v_head_dim})"
        scale = f" + {2 * SCALE_BYTES} B of scales" if engine == "sglang" and dtype == "int8" else ""
        return f"{self.layers} layers x {self.heads} KV heads x ({dims} x {size} B{scale})"


def layer_groups(spec: ModelSpec, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list[LayerGroup]:
    """Return the layers with a KV cache, grouped by shape. If several GPUs share the model, those of one GPU."""
    if spec.kv_lora_rank:
        # MLA stores one compressed vector and the rotated part, for any number of heads.
        attending = sum(map(bool, spec.layer_kv_heads)) if spec.layer_kv_heads else spec.num_hidden_layers
        layers = -(-attending // pipeline_parallel)
        return [LayerGroup(layers, 1, spec.kv_lora_rank, spec.qk_rope_head_dim or 0, sliding=False)]
    heads = spec.layer_kv_heads or (spec.num_kv_heads,) * spec.num_hidden_layers
    sliding = set(spec.sliding_layer_ids)
    counts: dict[tuple[int, int, int, bool], int] = {}
    for layer, count in enumerate(heads):
        if count == 0:
            continue
        is_sliding = layer in sliding
        dims = (spec.head_dim, spec.v_head_dim)
        if is_sliding and spec.sliding_head_dim is not None:
            dims = (spec.sliding_head_dim, spec.sliding_head_dim)
        key = (max(1, count // tensor_parallel), *dims, is_sliding)
        counts[key] = counts.get(key, 0) + 1
    return [LayerGroup(-(-layers // pipeline_parallel), *key) for key, layers in counts.items()]


def kv_bytes_per_token(spec: ModelSpec, request: PlanRequest) -> int:
    """Return the bytes that one token takes, all layers together: keys and values of every KV head."""
    groups = layer_groups(spec, tensor_parallel=request.tensor_parallel, pipeline_parallel=request.pipeline_parallel)
    return round(sum(group.token_bytes(request.engine, request.kv_dtype) for group in groups))


@dataclass(frozen=True, slots=True)
class Pool:
    """A KV cache."""

    tokens: int
    """Tokens that all requests together can use."""
    n_bytes: int
    formula: str


def sglang_pool(spec: ModelSpec, request: PlanRequest, tokens: int) -> Pool:
    """Return SGLang's pool of these tokens.

    Layers with a sliding window take as much as the others: SGLang 0.5.23 has its second, smaller pool for other
    families than those that the plugin serves (configs/model_config.py, is_hybrid_swa_model).
    """
    groups = layer_groups(spec, tensor_parallel=request.tensor_parallel, pipeline_parallel=request.pipeline_parallel)
    per_token = kv_bytes_per_token(spec, request)
    words = " + ".join(group.words("sglang", request.kv_dtype) for group in groups) or "no layer has a KV cache"
    text = f"({tokens:,} tokens + {PADDING_TOKENS} of padding) x {per_token:,} B; one token: {words}"
    return Pool(tokens, (tokens + PADDING_TOKENS) * per_token, text)


def sglang_tokens(spec: ModelSpec, request: PlanRequest, n_bytes: int) -> int:
    """Return how many tokens SGLang's pool of at most these bytes holds."""
    per_token = kv_bytes_per_token(spec, request)
    return max(0, n_bytes // per_token - PADDING_TOKENS) if per_token else request.context_length


def llama_pool(spec: ModelSpec, request: PlanRequest) -> Pool:
    """Return llama.cpp's cache, which always has cells for the whole context of each parallel request.

    Sliding-window layers keep the window and one batch (llama-kv-cache-iswa.cpp), recurrent layers a state per request.
    """
    n, batch = request.max_running_requests, llama_batch(request)
    cells = _padded(request.context_length, LLAMA_CELLS)
    window = min(cells, _padded((spec.sliding_window or 0) + batch, LLAMA_CELLS))
    total, words = 0.0, []
    for group in layer_groups(spec):
        own = window if group.sliding and spec.sliding_window else cells
        total += n * own * group.token_bytes("llama.cpp", request.kv_dtype)
        words.append(f"{own:,} cells x {group.words('llama.cpp', request.kv_dtype)}")
    states = recurrent_bytes(spec) * n
    if states:
        words.append(f"{recurrent_bytes(spec):,} B of recurrent state")
    text = f"{n} requests x ({' + '.join(words)})"
    return Pool(n * cells, round(total) + states, text)


def llama_batch(request: PlanRequest) -> int:
    """Return llama.cpp's physical batch: chunked_prefill_tokens, at most its default of 512 (common.h, n_ubatch)."""
    return min(512, max(request.chunked_prefill_tokens, 32))


def recurrent_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one request's recurrent state in fp32, summed over the layers that have one."""
    return STATE_ELEMENT_BYTES * len(_state_layers(spec)) * _state_values(spec)


def _state_layers(spec: ModelSpec) -> Sequence[int]:
    """Return the layers with a state, found by their tensors; if those are unknown, the layers without KV heads."""
    if spec.state_layer_ids:
        return spec.state_layer_ids
    heads = spec.layer_kv_heads or (0,) * spec.num_hidden_layers
    return [layer for layer, count in enumerate(heads) if count == 0]


def _state_values(spec: ModelSpec) -> int:
    """Return the values that one layer keeps for one request (llama.cpp, llama-hparams.cpp: n_embd_r + n_embd_s)."""
    if spec.wkv_head_size:
        return spec.hidden_size * ((spec.token_shift_count or TOKEN_SHIFTS) + spec.wkv_head_size)
    if spec.shortconv_columns:
        return spec.hidden_size * (spec.shortconv_columns - 1)
    kept = max(0, (spec.ssm_conv_kernel or 1) - 1)
    if spec.kda_head_dim:
        return spec.num_heads * spec.kda_head_dim * (3 * kept + spec.kda_head_dim)
    if not spec.ssm_state_size or not spec.ssm_inner_size:
        return 0
    channels = spec.ssm_inner_size + 2 * (spec.ssm_num_groups or 0) * spec.ssm_state_size
    return kept * channels + spec.ssm_state_size * spec.ssm_inner_size


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
