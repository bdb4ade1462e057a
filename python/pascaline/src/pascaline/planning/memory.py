"""Memory by part: what an engine allocates besides weights and KV cache, each with its formula and its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pascaline.planning.kv_cache import llama_batch
from pascaline.planning.weights import DTYPE_BYTES, stays_quantized
from pascaline.plugin import PLUGIN
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.cards import Card, Fact
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.kv_cache import Pool
    from pascaline.planning.request import PlanRequest
    from pascaline.planning.weights import Weights

Origin = Literal["exact", "measured", "documented", "estimated"]

REQUEST_TABLE_EXTRA = 4
"""Columns beyond the context in SGLang's table of token slots (mem_cache/allocation_sizing.py)."""
ROPE_MARGIN = 256
ROPE_STEP = 128
"""Positions that SGLang's RoPE table has beyond the context, and the multiple that it is rounded up to (environ.py)."""
LOGIT_BYTES = 26
"""Per logit while SGLang's PyTorch sampler runs: fp16 and fp32 logits, probabilities, sorted copy, int64 order, sum."""
ATTENTION_SPLIT, ATTENTION_SPLITS = PLUGIN.most_split, PLUGIN.most_splits
"""Most tokens of one part of a sequence in decode attention, and most parts of a shorter one; each part stores an fp32
result for the second kernel."""
BUFFERS_PER_TOKEN = 3
"""Hidden vectors alive at once in a layer: residual, normalised input, output (SGLang's models/llama.py)."""
WIDE_BYTES = 2 * (1 + 8 / PLUGIN.activation_block)
"""An activation as sglang-pascal multiplies it: two int8, and two fp32 numbers for a block of each."""
GRAPH_SIZES = PLUGIN.graph_batch_sizes
"""Batch sizes of decode graphs."""
TILE_SUMS_BYTES = 60 * 2 * 64 * 1024
"""Sums that the tiles of a product keep: 64 KiB of each of two on up to 60 multiprocessors (kernels/tile_matmul.cu)."""

LLAMA_CPU_VECTORS = 5
"""Hidden vectors beside the logits in llama.cpp's buffer on the CPU, as its log shows for six models."""

_GEMMA_3 = ("gemma3", "gemma3_text")


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the memory table."""

    key: str
    name: str
    n_bytes: int
    formula: str
    """The calculation with its numbers."""
    origin: Origin
    source: str = ""
    """Where the constants come from; empty if everything is in the model's header."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "key": self.key,
            "name": self.name,
            "bytes": self.n_bytes,
            "formula": self.formula,
            "origin": self.origin,
            "source": self.source,
        }


def static_parts(spec: ModelSpec, request: PlanRequest, weights: Weights, pool: Pool) -> list[Part]:
    """Return what is allocated once, before the first request. SGLang's mem_fraction_static limits the sum."""
    source = "" if request.engine == "llama.cpp" else "sglang-pascal: quantization/storage.py, kernels/formats.py"
    parts = [
        Part("weights", "weights", weights.n_bytes, weights.formula, "exact", source),
        Part("kv_pool", "KV cache", pool.n_bytes, pool.formula, "exact", _POOL_SOURCES[request.engine]),
    ]
    if request.engine == "sglang":
        parts.append(_tables(spec, request))
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


def dynamic_parts(spec: ModelSpec, request: PlanRequest, weights: Weights, card: Card) -> list[Part]:
    """Return what is allocated while requests run, and what the runtime itself needs."""
    if request.engine == "llama.cpp":
        found = [_llama_compute(spec, request)]
    else:
        found = [*_dequantized(request, weights), _activations(spec, request), _logits(spec, request)]
    return [*found, *_constants(request, card)]


_POOL_SOURCES = {
    "sglang": "SGLang 0.5.23, mem_cache/memory_pool.py, MHATokenToKVPool",
    "llama.cpp": "llama.cpp, src/llama-kv-cache.cpp and llama-kv-cache-iswa.cpp",
}


def _tables(spec: ModelSpec, request: PlanRequest) -> Part:
    rows, columns = request.max_running_requests + 1, request.context_length + REQUEST_TABLE_EXTRA
    ropes, positions = rope_tables(spec), rope_positions(spec, request)
    others = _small_buffers(spec, request)
    text = (
        f"slots of requests {rows} x {columns:,} x 4 B + RoPE {ropes} x {positions:,} positions x {spec.head_dim} x 4 B"
    )
    if others:
        text += f" + buffers of {spec.architecture} {others:,} B"
    n_bytes = rows * columns * 4 + ropes * positions * spec.head_dim * 4 + others
    source = "SGLang 0.5.23: ReqToTokenPool, reserve_rope_cache_for_long_sequences, models/gemma*.py"
    return Part("tables", "tables", n_bytes, text, "exact", source)


def rope_tables(spec: ModelSpec) -> int:
    """Return how many RoPE tables SGLang makes: Gemma 3 uses another base for sliding layers than for the rest."""
    return 2 if spec.architecture in _GEMMA_3 else 1


def rope_positions(spec: ModelSpec, request: PlanRequest) -> int:
    """Return the rows of a RoPE table: the larger of the model's context and the request's with a margin."""
    reserved = request.context_length + ROPE_MARGIN
    return max(spec.context_length, -(-reserved // ROPE_STEP) * ROPE_STEP)


def _small_buffers(spec: ModelSpec, request: PlanRequest) -> int:
    """Gemma 2 keeps each norm's weight + 1 beside the weight, and its normaliser; Gemma 3 two sets of frequencies."""
    if spec.architecture in _GEMMA_3:
        return 2 * (spec.head_dim // 2) * 4
    if spec.architecture not in ("gemma", "gemma2"):
        return 0
    norms = sum(tensor.n_elements for tensor in spec.tensors if "norm" in tensor.name and len(tensor.shape) == 1)
    return (norms + 1) * DTYPE_BYTES[request.dtype]


def _dequantized(request: PlanRequest, weights: Weights) -> list[Part]:
    if request.quantization == "bitsandbytes":
        text = f"the largest matrix in {request.dtype}: bitsandbytes expands one for each product of more than one row"
        return [Part("workspace", "dequantisation", weights.largest_matrix_bytes, text, "documented", "bitsandbytes")]
    text = "none: every type that stays quantised is multiplied without expanding it"
    return [Part("workspace", "dequantisation", 0, text, "exact", "sglang-pascal: quantization/storage.py")]


def _activations(spec: ModelSpec, request: PlanRequest) -> Part:
    """The larger of a prefill chunk and a decode step: hidden vectors, MLP, int8 copy, attention's partial results."""
    element, tokens = DTYPE_BYTES[request.dtype], max(request.chunked_prefill_tokens, request.max_running_requests)
    inner = max(spec.intermediate_size, spec.moe_intermediate_size or 0) // request.tensor_parallel
    heads = spec.num_heads * spec.head_dim + 2 * spec.num_kv_heads * spec.head_dim
    widest = max(3 * inner, 2 * heads)
    layer = tokens * (BUFFERS_PER_TOKEN * spec.hidden_size + widest) * element
    splits = max(ATTENTION_SPLITS, -(-request.context_length // ATTENTION_SPLIT))
    partial = request.max_running_requests * spec.num_heads * splits * (spec.v_head_dim + 2) * 4
    attention = partial if request.device == "cuda" else _cpu_attention(spec, request)
    text = (
        f"{tokens:,} tokens x ({BUFFERS_PER_TOKEN} x {spec.hidden_size:,} + {widest:,}) x {element} B"
        f" + attention {format_bytes(attention)}"
    )
    quantized = 0
    if stays_quantized(spec, request):
        copies = round(tokens * max(inner, spec.hidden_size) * WIDE_BYTES)
        quantized = copies + TILE_SUMS_BYTES
        text += f" + two int8 copies {format_bytes(copies)} + sums of tiles {format_bytes(TILE_SUMS_BYTES)}"
    source = "SGLang 0.5.23, models/llama.py; sglang-pascal: attention"
    return Part("activations", "activations", layer + attention + quantized, text, "estimated", source)


def _cpu_attention(spec: ModelSpec, request: PlanRequest) -> int:
    """Keys and values of a whole context, gathered for one layer (sglang_pascal/attention/paged.py)."""
    values = spec.num_kv_heads * (spec.head_dim + spec.v_head_dim)
    rows = 2 * request.context_length * values * DTYPE_BYTES[request.dtype]
    return rows * request.max_running_requests


def _logits(spec: ModelSpec, request: PlanRequest) -> Part:
    n = request.max_running_requests
    text = f"{n} requests x vocabulary of {spec.vocab_size:,} x {LOGIT_BYTES} B while sampling"
    source = "SGLang 0.5.23, layers/sampler.py, sampling backend pytorch"
    return Part("logits", "logits", n * spec.vocab_size * LOGIT_BYTES, text, "estimated", source)


def _llama_compute(spec: ModelSpec, request: PlanRequest) -> Part:
    """llama.cpp's graph buffer: its peak is the output layer of a full batch, logits beside the hidden vectors.

    On the CPU the input of the last layer and the attention mask are in the same buffer.
    """
    batch = llama_batch(request)
    vectors = 1 if request.device == "cuda" else LLAMA_CPU_VECTORS
    n_bytes = batch * (spec.vocab_size + vectors * spec.hidden_size) * 4
    text = f"batch of {batch} x (vocabulary {spec.vocab_size:,} + {vectors} x hidden {spec.hidden_size:,}) x 4 B"
    if request.device == "cpu":
        n_bytes += batch * request.context_length * 4
        text += f" + mask {batch} x {request.context_length:,} x 4 B"
    source = "llama.cpp's own log of its compute buffers (benchmarks/plan_compare.py)"
    return Part("activations", "compute buffer", n_bytes, text, "measured", source)


def recorded_sizes(max_running_requests: int) -> int:
    """Return how many decode graphs there are: SGLang adds max_running_requests if it left out a larger size."""
    known = len([size for size in GRAPH_SIZES if size <= max_running_requests])
    return known + int(max_running_requests not in GRAPH_SIZES and max_running_requests < GRAPH_SIZES[-1])


def _constants(request: PlanRequest, card: Card) -> list[Part]:
    """Constants of the card, which do not depend on the model."""
    prefix = f"{request.engine.replace('.', '_')}_"
    parts = []
    for key, name in _CONSTANTS.items():
        fact: Fact | None = card.planning.get(prefix + key) or card.planning.get(key)
        if fact is not None:
            text, count = f"constant of {card.name}", 1
            if key == "graphs_bytes" and request.engine == "sglang":
                count = recorded_sizes(request.max_running_requests)
                text = f"{count} recorded batch sizes x {format_bytes(int(fact.value))}"
            parts.append(
                Part(key.removesuffix("_bytes"), name, count * int(fact.value), text, fact.origin, fact.source)
            )
    return parts


_CONSTANTS = {
    "graphs_bytes": "CUDA graphs",
    "context_bytes": "CUDA context",
    "library_bytes": "libraries",
    "process_bytes": "processes",
    "fragmentation_bytes": "fragmentation",
}
"""Key in the card's data, with or without the engine's name in front -> what the table calls it."""
