"""What SGLang allocates besides weights and KV pool: tables, activations, logits, CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.memory_model import Part
from pascaline.engines.sglang import speculation
from pascaline.engines.sglang.weights import BITSANDBYTES, stays_quantized
from pascaline.engines.tensors import DTYPE_BYTES
from pascaline.plugin import PLUGIN
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.engines.memory_model import Weights
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec

REQUEST_TABLE_EXTRA = 4
"""Columns beyond the context in SGLang's table of token slots (mem_cache/allocation_sizing.py)."""
ROPE_MARGIN = 256
ROPE_STEP = 128
"""Positions that SGLang's RoPE table has beyond the context, and the multiple that it is rounded up to (environ.py)."""
OUTPUT_BYTES = 4
"""Per logit of the buffer that recorded steps write: float32."""
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

_GEMMA_3 = ("gemma3", "gemma3_text")


def buffers(spec: ModelSpec, request: PlanRequest, weights: Weights) -> list[Part]:
    """Return what is allocated while requests run."""
    return [*_dequantized(request, weights), _activations(spec, request), _logits(spec, request)]


def tables(spec: ModelSpec, request: PlanRequest) -> Part:
    """Return the slots of requests, the RoPE tables and an architecture's own buffers."""
    rows, extra = request.max_running_requests + 1, REQUEST_TABLE_EXTRA
    if request.speculation.rows:
        extra += request.speculation.width
    columns = request.context_length + extra
    ropes, positions = rope_tables(spec), rope_positions(spec, request)
    others = _small_buffers(spec, request)
    text = (
        f"slots of requests {rows} x {columns:,} x 4 B + RoPE {ropes} x {positions:,} positions x {spec.head_dim} x 4 B"
    )
    if others:
        text += f" + buffers of {spec.architecture} {others:,} B"
    n_bytes = rows * columns * 4 + ropes * positions * spec.head_dim * 4 + others
    source = "SGLang: ReqToTokenPool, reserve_rope_cache_for_long_sequences, models/gemma*.py"
    return Part("tables", "tables", n_bytes, text, "exact", source)


def draft_buffers(draft: ModelSpec, request: PlanRequest) -> int:
    """Return the bytes of a draft model's RoPE tables, and of the logits of its passes, two rows of each request."""
    ropes = rope_tables(draft) * rope_positions(draft, request) * draft.head_dim * 4
    return ropes + 2 * request.max_running_requests * draft.vocab_size * OUTPUT_BYTES


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
    if request.quantization == BITSANDBYTES:
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
    source = "SGLang, models/llama.py; sglang-pascal: attention"
    return Part("activations", "activations", layer + attention + quantized, text, "estimated", source)


def _cpu_attention(spec: ModelSpec, request: PlanRequest) -> int:
    """Keys and values of a whole context, gathered for one layer (sglang_pascal/attention/paged.py)."""
    values = spec.num_kv_heads * (spec.head_dim + spec.v_head_dim)
    rows = 2 * request.context_length * values * DTYPE_BYTES[request.dtype]
    return rows * request.max_running_requests


def _logits(spec: ModelSpec, request: PlanRequest) -> Part:
    """With speculation, a token is drawn from each verified row, and the output of a graph has rows for all widths."""
    n = request.max_running_requests if request.role == "generate" else 0
    drafts = request.speculation
    rows = max(n, min(drafts.rows, n * drafts.width))
    unit = "rows" if drafts.rows else "requests"
    text = f"{rows} {unit} x vocabulary of {spec.vocab_size:,} x {LOGIT_BYTES} B while sampling"
    n_bytes = rows * spec.vocab_size * LOGIT_BYTES
    if drafts.rows and request.device == "cuda":
        recorded = n * drafts.width
        n_bytes += recorded * spec.vocab_size * OUTPUT_BYTES
        text += f" + {recorded} rows of recorded steps x vocabulary x {OUTPUT_BYTES} B"
    source = "SGLang, layers/sampler.py, sampling backend pytorch; model_executor/graph_shared_output.py"
    return Part("logits", "logits", n_bytes, text, "estimated", source)


def graph_sizes(max_running_requests: int) -> list[int]:
    """Return the batch sizes of decode graphs: SGLang adds max_running_requests if it left out a larger size."""
    sizes = [size for size in GRAPH_SIZES if size <= max_running_requests]
    is_between = max_running_requests not in GRAPH_SIZES and max_running_requests < GRAPH_SIZES[-1]
    return [*sizes, max_running_requests] if is_between else sizes


def recorded_steps(request: PlanRequest) -> int:
    """Return how many decode graphs there are: one per batch size, and for each further width those that rows allow.

    A draft model has those of one row, and of the two rows of its first pass.
    """
    sizes, drafts = graph_sizes(request.max_running_requests), request.speculation
    own = len(sizes) + sum(size * width <= drafts.rows for width in speculation.widths(drafts) for size in sizes)
    if drafts.draft is None:
        return own
    return own + len(sizes) + sum(size * speculation.DRAFT_ROWS <= drafts.rows for size in sizes)
