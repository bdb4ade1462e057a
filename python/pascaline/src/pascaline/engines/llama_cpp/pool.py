"""What llama.cpp's kernels take from their pool on a GPU while a batch runs. Its log does not name it.

The rules are those of ggml-cuda's mmq.cu (products of quantised inputs) and ggml-cuda.cu (cuBLAS, without dp4a).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.memory_model import Part
from pascaline.engines.tensors import is_experts, is_matrix, is_vocabulary, padded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pascaline.cards import Card
    from pascaline.models.spec import ModelSpec, TensorSpec

HALF_BYTES, FLOAT_BYTES = 2, 4
ROW_PADDING = 512
"""Values that an input's rows are padded to (MATRIX_ROW_PADDING)."""
BLOCK_VALUES, BLOCK_BYTES = 32, 36
"""Of a quantised input (ggml-common.h, block_q8_1)."""
LOOK_AHEAD = 1.05
"""A pool without virtual memory allocates this times what is asked for (ggml_cuda_pool_leg)."""
SOURCE = "llama.cpp, ggml-cuda/mmq.cu and ggml-cuda.cu"


def kernel_pool(spec: ModelSpec, batch: int, card: Card) -> Part:
    """Return the part of the plan for batches of this many tokens."""
    matrices = [tensor for tensor in spec.tensors if is_matrix(tensor) and not is_vocabulary(tensor.name)]
    experts = [tensor for tensor in matrices if is_experts(tensor.name)]
    dense = [tensor for tensor in matrices if not is_experts(tensor.name)]
    rows = batch * (spec.num_experts_per_token or 1)
    if card.has_dp4a:
        n_bytes = max(_quantized(batch, _widest(dense)), _quantized(rows, _widest(experts)))
        text = f"inputs of a product in blocks of {BLOCK_BYTES} B for {BLOCK_VALUES} values: {n_bytes:,} B"
    else:
        n_bytes = max(
            _largest(dense) + batch * HALF_BYTES * (_widest(dense) + _tallest(dense)),
            _largest(experts) + rows * FLOAT_BYTES * (_widest(experts) + _tallest(experts)),
        )
        text = f"a matrix in half precision, its inputs and outputs: {n_bytes:,} B"
    return Part("workspace", "kernels' pool", int(n_bytes * LOOK_AHEAD), f"{text} x {LOOK_AHEAD}", "estimated", SOURCE)


def _quantized(rows: int, width: int) -> int:
    return rows * padded(width, ROW_PADDING) // BLOCK_VALUES * BLOCK_BYTES


def _widest(tensors: Iterable[TensorSpec]) -> int:
    """Return the most inputs of a row."""
    return max((tensor.shape[-1] for tensor in tensors), default=0)


def _tallest(tensors: Iterable[TensorSpec]) -> int:
    """Return the most outputs."""
    return max((tensor.shape[-2] for tensor in tensors), default=0)


def _largest(tensors: Iterable[TensorSpec]) -> int:
    """Return the bytes of the largest matrix in half precision; of experts, one at a time is converted."""
    return max((tensor.shape[-1] * tensor.shape[-2] for tensor in tensors), default=0) * HALF_BYTES
