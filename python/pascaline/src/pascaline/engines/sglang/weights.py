"""How SGLang with the plugin holds a model's tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pascaline.engines.memory_model import HeldTensor
from pascaline.engines.tensors import (
    DTYPE_BYTES,
    DTYPE_TYPES,
    is_matrix,
    is_output,
    is_vocabulary,
    matrix_shape,
    padded,
)
from pascaline.models.ggml_types import BLOCKS
from pascaline.plugin import PLUGIN
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.engines.plan_request import PlanRequest
    from pascaline.models.spec import ModelSpec, TensorSpec

SOURCE = "sglang-pascal: quantization/storage.py, kernels/formats.py"
HELD_AS = PLUGIN.held_as
"""Type of a matrix in a GGUF file -> the type in which sglang-pascal holds it on a GPU; all others become DENSE."""
PACKED_ROWS, PACKED_COLUMNS = PLUGIN.row_multiple, PLUGIN.column_multiple
"""Its device layout pads a matrix to multiples of these."""
VOCABULARY_MULTIPLE = 64
"""SGLang pads embedding and output to it (layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""
DENSE = PLUGIN.dense
"""Type in which a matrix without kernels is held."""
WITH_KERNELS = "Q4_K_M or Q8_0"
"""Mixtures that the notes recommend: the usual small one and the largest whose types all have kernels."""
BITSANDBYTES = "bitsandbytes"
"""The method by which SGLang itself quantises a folder while it loads it."""
NF4 = "NF4"
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""bitsandbytes NF4 with double quantisation: 4 bits, one 8-bit scale per 64 weights, one fp32 per 256 scales."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# RoPE factors are read into a table, and inverse frequencies are computed.
_NOT_LOADED = re.compile(r"^rope_(freqs|factors)|rotary_emb\.inv_freq$")


def held_tensor(tensor: TensorSpec, spec: ModelSpec, request: PlanRequest) -> HeldTensor | None:
    """Return how it holds one tensor; None for one that it does not load."""
    if _NOT_LOADED.search(tensor.name) or (is_output(tensor.name) and spec.tied_embeddings):
        return None
    rows, columns = matrix_shape(tensor)
    if is_vocabulary(tensor.name):
        rows = padded(rows, VOCABULARY_MULTIPLE)
    if is_matrix(tensor) and stays_quantized(spec, request):
        return _quantized(tensor)
    if spec.format == "safetensors" and tensor.tensor_type not in _FLOATS:
        return HeldTensor(tensor.tensor_type, tensor.n_bytes)
    if request.quantization == BITSANDBYTES and is_matrix(tensor) and not is_vocabulary(tensor.name):
        return HeldTensor(NF4, round(rows * columns * NF4_BYTES))
    return HeldTensor(DTYPE_TYPES[request.dtype], rows * columns * DTYPE_BYTES[request.dtype])


def stays_quantized(spec: ModelSpec, request: PlanRequest) -> bool:
    """Whether it keeps a GGUF file's matrices quantised: on a GPU, or if `quantization` is `gguf`.

    sglang_pascal/platform.py makes it the GPU's default; on a CPU all tensors are dequantised, which is faster there.
    """
    method = request.quantization or {"cuda": PLUGIN.quantization}.get(request.device)
    return spec.format == "gguf" and method == PLUGIN.quantization


def _quantized(tensor: TensorSpec) -> HeldTensor:
    rows, columns = matrix_shape(tensor)
    held = HELD_AS.get(tensor.tensor_type)
    if held is None:
        return HeldTensor(DENSE, 2 * rows * columns)
    elements, n_bytes = BLOCKS[held]
    return HeldTensor(held, padded(rows, PACKED_ROWS) * padded(columns, PACKED_COLUMNS) // elements * n_bytes)


def expanded(spec: ModelSpec, request: PlanRequest) -> list[str]:
    """Return one sentence for each matrix type that is held as float16 because it has no kernels."""
    if not stays_quantized(spec, request):
        return []
    sizes: dict[str, tuple[int, int]] = {}
    for tensor in spec.tensors:
        if not is_matrix(tensor) or tensor.tensor_type in DTYPE_TYPES.values():
            continue
        if (held := _quantized(tensor)).tensor_type == DENSE:
            in_file, on_card = sizes.get(tensor.tensor_type, (0, 0))
            sizes[tensor.tensor_type] = in_file + tensor.n_bytes, on_card + held.n_bytes
    return [
        f"{kind} has no kernels here and is held as float16: {format_bytes(on_card)} on the card for "
        f"{format_bytes(in_file)} in the file; quantise the model to {WITH_KERNELS}, or take engine llama.cpp, which "
        f"computes with {kind} as it is"
        for kind, (in_file, on_card) in sorted(sizes.items())
    ]
