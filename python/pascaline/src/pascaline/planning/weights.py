"""Memory of a model's weights on the device and bytes that a step reads, tensor by tensor from the header."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pascaline.models.ggml_types import TENSOR_TYPES
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.models.spec import ModelSpec, TensorSpec
    from pascaline.planning.request import PlanRequest

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
DTYPE_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Type of the computation -> the name that model files have for it."""
HELD_AS = PLUGIN.held_as
"""Type of a matrix in a GGUF file -> the type in which sglang-pascal holds it on a GPU; all others become DENSE."""
PACKED_ROWS, PACKED_COLUMNS = PLUGIN.row_multiple, PLUGIN.column_multiple
"""Its device layout pads a matrix to multiples of these."""
VOCABULARY_MULTIPLE = 64
"""SGLang pads embedding and output to it (layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""
DENSE = PLUGIN.dense
"""Type in which a matrix without kernels is held."""
NF4 = "NF4"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""bitsandbytes NF4 with double quantisation: 4 bits, one 8-bit scale per 64 weights, one fp32 per 256 scales."""
ALLOCATION_STEP = 2 * 2**20
"""torch's CUDA allocator takes memory for tensors from LARGE_TENSOR on in these steps (CUDACachingAllocator.cpp)."""
LARGE_TENSOR = 10 * 2**20

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_EXPERTS = re.compile(r"_exps\.weight$|\.experts\.")
_EMBEDDING = re.compile(r"^token_embd\.weight$|(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")
_OUTPUT = re.compile(r"^output\.weight$|(^|\.)lm_head\.weight$")
# RoPE factors are read into a table, and inverse frequencies are computed.
_NOT_LOADED = re.compile(r"^rope_(freqs|factors)|rotary_emb\.inv_freq$")
_BLOCKS = {kind.name: (kind.block_elements, kind.block_bytes) for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights on one device. Bytes; operations per token."""

    n_bytes: int
    """Bytes on the device."""
    host_bytes: int
    """Kept in the host's memory instead (llama.cpp: the input embedding)."""
    rounding_bytes: int
    """Bytes that the allocator takes in addition."""
    dense_read_bytes: int
    """Bytes that every step reads: all except the input embedding and the experts."""
    expert_read_bytes: int
    """Bytes of the experts that one token uses."""
    expert_bytes: int
    """Bytes of all experts."""
    matrix_read_bytes: Mapping[str, int]
    """Matrices that a decode step of one request multiplies with, by the type in which the engine holds them: what
    read_bytes(1) counts without the vectors (norms, biases)."""
    macs: int
    """Multiply-accumulates that one token costs, output layer included."""
    output_macs: int
    """The part in the output layer, which prefill computes for the last token only."""
    largest_matrix_bytes: int
    """Largest matrix outside of the vocabulary, in the type of the computation."""
    formula: str

    def read_bytes(self, batch: int) -> float:
        """Bytes that one decode step of `batch` requests reads; different requests use different experts."""
        return self.dense_read_bytes + min(self.expert_bytes, batch * self.expert_read_bytes)


def weights_on_device(spec: ModelSpec, request: PlanRequest) -> Weights:
    """Return memory and cost of the weights under an engine on a device; per GPU if several share the model."""
    sums = _Sums(spec, request)
    for tensor in spec.tensors:
        sums.add(tensor)
    return sums.result()


class Residence(NamedTuple):
    """How the engine holds a tensor in its memory."""

    tensor_type: str
    """Name of the type in model files, or NF4."""
    n_bytes: int


def residence(tensor: TensorSpec, spec: ModelSpec, request: PlanRequest) -> Residence:
    """Return how the engine holds one tensor."""
    if request.engine == "llama.cpp":
        return Residence(tensor.tensor_type, tensor.n_bytes)
    rows, columns = _matrix(tensor)
    if _is_vocabulary(tensor.name):
        rows = _padded(rows, VOCABULARY_MULTIPLE)
    is_matrix = len(tensor.shape) > 1
    if is_matrix and stays_quantized(spec, request):
        return _quantized_residence(tensor)
    if spec.format == "safetensors" and tensor.tensor_type not in _FLOATS:
        return Residence(tensor.tensor_type, tensor.n_bytes)
    if request.quantization == "bitsandbytes" and is_matrix and not _is_vocabulary(tensor.name):
        return Residence(NF4, round(rows * columns * NF4_BYTES))
    return Residence(DTYPE_TYPES[request.dtype], rows * columns * DTYPE_BYTES[request.dtype])


def stays_quantized(spec: ModelSpec, request: PlanRequest) -> bool:
    """Whether SGLang keeps a GGUF file's matrices quantised: on a GPU, or if `quantization` is `gguf`.

    sglang_pascal/platform.py makes it the GPU's default; on a CPU all tensors are dequantised, which is faster there.
    """
    return (
        spec.format == "gguf"
        and (request.quantization or {"cuda": PLUGIN.quantization}.get(request.device)) == PLUGIN.quantization
    )


class _Sums:
    """Adds up tensors."""

    def __init__(self, spec: ModelSpec, request: PlanRequest) -> None:
        self._spec, self._request = spec, request
        self._has_output = any(_OUTPUT.search(tensor.name) for tensor in spec.tensors)
        self._bytes = self._host = self._rounding = 0
        self._dense = self._experts = self._macs = self._output_macs = self._largest = 0
        self._expert_macs = 0
        # Of the experts, one token uses this part.
        self._used = (spec.num_experts_per_token or 0) / spec.num_experts if spec.num_experts else 1.0
        self._by_type: dict[str, int] = {}
        self._matrices: dict[str, float] = {}

    def add(self, tensor: TensorSpec) -> None:
        """Count one tensor."""
        spec, request = self._spec, self._request
        llama = request.engine == "llama.cpp"
        is_embedding, is_output = bool(_EMBEDDING.search(tensor.name)), bool(_OUTPUT.search(tensor.name))
        if not llama and (_NOT_LOADED.search(tensor.name) or (is_output and spec.tied_embeddings)):
            return
        held, size = residence(tensor, spec, request)
        tied = is_embedding and (spec.tied_embeddings or not self._has_output)
        if llama and is_embedding and request.device == "cuda":
            # llama.cpp looks tokens up on the CPU and puts a second copy of a tied matrix on the GPU.
            self._host += size
            if not tied:
                return
        self._bytes += size
        if size >= LARGE_TENSOR:
            self._rounding += _padded(size, ALLOCATION_STEP) - size
        self._by_type[tensor.tensor_type] = self._by_type.get(tensor.tensor_type, 0) + size
        if len(tensor.shape) > 1 and not _is_vocabulary(tensor.name):
            self._largest = max(self._largest, tensor.n_elements * DTYPE_BYTES[request.dtype])
        if not is_embedding or tied:
            self._count_work(tensor, held, size, is_output=is_output or tied)

    def _count_work(self, tensor: TensorSpec, held: str, size: int, *, is_output: bool) -> None:
        if _EXPERTS.search(tensor.name):
            self._experts += size
            self._expert_macs += tensor.n_elements
            self._matrices[held] = self._matrices.get(held, 0) + size * self._used
            return
        self._dense += size
        if len(tensor.shape) > 1:
            self._macs += tensor.n_elements
            self._matrices[held] = self._matrices.get(held, 0) + size
            if is_output:
                self._output_macs += tensor.n_elements

    def result(self) -> Weights:
        """The sums for one of the GPUs that share the model."""
        spec, share = self._spec, self._request.tensor_parallel * self._request.pipeline_parallel
        types = ", ".join(
            f"{kind} {size / 2**20:,.1f} MiB" for kind, size in sorted(self._by_type.items(), key=lambda item: -item[1])
        )
        formula = f"sum over {len(spec.tensors)} tensors, by the file's types: {types}"
        if share > 1:
            formula += f"; of {share} GPUs each holds an equal part"
        return Weights(
            n_bytes=-(-self._bytes // share),
            host_bytes=self._host,
            rounding_bytes=-(-self._rounding // share) if self._request.engine == "sglang" else 0,
            dense_read_bytes=-(-self._dense // share),
            expert_read_bytes=int(self._experts * self._used / share),
            expert_bytes=-(-self._experts // share),
            matrix_read_bytes={kind: math.ceil(size / share) for kind, size in self._matrices.items()},
            macs=int((self._macs + self._expert_macs * self._used) / share),
            output_macs=self._output_macs // share,
            largest_matrix_bytes=self._largest,
            formula=formula,
        )


def _quantized_residence(tensor: TensorSpec) -> Residence:
    rows, columns = _matrix(tensor)
    held = HELD_AS.get(tensor.tensor_type)
    if held is None:
        return Residence(DENSE, 2 * rows * columns)
    elements, n_bytes = _BLOCKS[held]
    size = _padded(rows, PACKED_ROWS) * _padded(columns, PACKED_COLUMNS) // elements * n_bytes
    return Residence(held, size)


def _matrix(tensor: TensorSpec) -> tuple[int, int]:
    """A tensor as (rows, columns): experts and their rows are one dimension, a vector is one row."""
    columns = tensor.shape[-1] if tensor.shape else 1
    return tensor.n_elements // max(1, columns), columns


def _is_vocabulary(name: str) -> bool:
    return bool(_EMBEDDING.search(name) or _OUTPUT.search(name))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
