"""What llama.cpp's kernels take from their pool on a GPU while a batch runs. Its log does not name it.

The rules are those of ggml-cuda's mmq.cu (products of quantised inputs), ggml-cuda.cu (cuBLAS, for other types and
without dp4a) and fattn-common.cuh (attention that several blocks share). Each kernel gives back what it took, so the
pool grows to what the largest of them takes.
"""

from __future__ import annotations

from functools import cache
from math import ceil
from typing import TYPE_CHECKING

from pascaline.engines.memory_model import Part
from pascaline.engines.tensors import is_experts, is_matrix, is_output, is_vocabulary, padded

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
SIXTEEN_BIT = frozenset({"F16", "BF16"})
"""Types that a card without fast half precision multiplies in single precision."""
VECTOR_ROWS = 8
"""Most rows that a matrix of these types is multiplied with without a conversion (mmvf.cu)."""
TILE_COLUMNS, WIDE_TILE_COLUMNS, WIDE_HEAD = 32, 16, 256
"""Rows of queries in a tile of attention, and the fewer ones with heads beyond this size (fattn-tile.cuh)."""
TILE_KEYS = 32
"""Fewest keys of such a tile; the keys of a request are divided among at most that many blocks."""
BLOCKS_DP4A, BLOCKS = 2, 3
"""Blocks of the attention kernel that a multiprocessor runs at once. 6.1: two, as ptxas gives all of its kernels for
prompts 112 to 128 registers and 256 threads; 6.0: at most as many as its 64 KiB of shared memory hold."""
CORES_DP4A, CORES = 128, 64
"""Of a multiprocessor at compute capability 6.1, and at 6.0."""
GOOD_PERCENT = 95
"""Share of the multiprocessors that must be busy in the last wave for the kernel not to divide the keys further."""
PARTIAL_BYTES = 8
"""Maximum and sum of a row's part."""
SOURCE = "llama.cpp, ggml-cuda/mmq.cu, ggml-cuda.cu and fattn-common.cuh"


def kernel_pool(spec: ModelSpec, batch: int, card: Card, *, cells: int, sequences: int) -> Part:
    """Return the plan's part for the pool.

    batch: tokens of one computation. cells: positions of the KV cache that one sequence may use. sequences: the most
    that a batch holds.
    """
    products, text = _products(spec, batch, card, sequences)
    partial = attention_bytes(spec, batch, card, cells)
    if partial > products:
        products, text = partial, f"parts of the attention of {batch:,} tokens"
    n_bytes = int(products * LOOK_AHEAD)
    return Part("workspace", "kernels' pool", n_bytes, f"{text}: {products:,} B x {LOOK_AHEAD}", "estimated", SOURCE)


def _products(spec: ModelSpec, batch: int, card: Card, sequences: int) -> tuple[int, str]:
    """Return the most that a product takes, and what that is."""
    matrices = [tensor for tensor in spec.tensors if is_matrix(tensor) and not is_vocabulary(tensor.name)]
    experts = [tensor for tensor in matrices if is_experts(tensor.name)]
    dense = [tensor for tensor in matrices if not is_experts(tensor.name)]
    rows = batch * (spec.num_experts_per_token or 1)
    if not card.has_dp4a:
        n_bytes = max(
            _largest(dense) * HALF_BYTES + batch * HALF_BYTES * (_widest(dense) + _tallest(dense)),
            _largest_expert(experts) * HALF_BYTES + rows * FLOAT_BYTES * (_widest(experts) + _tallest(experts)),
        )
        return n_bytes, "a matrix in half precision, its inputs and outputs"
    # The output layer sees one row of each sequence.
    outputs = [tensor for tensor in spec.tensors if is_output(tensor.name)] if sequences > VECTOR_ROWS else []
    plain = _plain(experts)
    converted = max(
        _largest(_plain([*dense, *outputs])) * FLOAT_BYTES,
        FLOAT_BYTES * (_largest_expert(plain) + rows * (_widest(plain) + _tallest(plain))) if plain else 0,
    )
    quantized = max(_quantized(batch, _widest(dense)), _quantized(rows, _widest(experts)))
    if converted > quantized:
        return converted, "a matrix of 16 bits in single precision"
    return quantized, f"inputs of a product in blocks of {BLOCK_BYTES} B for {BLOCK_VALUES} values"


def attention_bytes(spec: ModelSpec, batch: int, card: Card, cells: int) -> int:
    """Return what attention takes for the parts of its output, each in single precision.

    Its blocks divide the keys among them so that all multiprocessors are busy, and a last step adds their parts. Any
    batch up to this size may come, and a smaller one may be divided among more blocks.
    """
    width = spec.kv_lora_rank or max(spec.v_head_dim, spec.sliding_head_dim or 0)
    rows = batch * spec.num_heads
    if not rows or not width or "cores" not in card.facts:
        return 0
    columns = TILE_COLUMNS if max(spec.head_dim, width) <= WIDE_HEAD else WIDE_TILE_COLUMNS
    at_once = BLOCKS_DP4A if card.has_dp4a else BLOCKS
    processors = max(1, int(card.number("cores")) // (CORES_DP4A if card.has_dp4a else CORES))
    tiles = most_blocks(ceil(rows / columns), at_once, processors, max(1, cells // TILE_KEYS))
    return tiles * columns * (width * FLOAT_BYTES + PARTIAL_BYTES)


@cache
def most_blocks(most_tiles: int, at_once: int, processors: int, key_tiles: int) -> int:
    """Return the most blocks that attention over 1 to `most_tiles` tiles is divided into; 0 if it is never divided."""
    counts = (tiles * _blocks_of_tile(tiles, at_once, processors, key_tiles) for tiles in range(1, most_tiles + 1))
    return max((count for tiles, count in enumerate(counts, 1) if count > tiles), default=0)


def _blocks_of_tile(tiles: int, at_once: int, processors: int, key_tiles: int) -> int:
    """Return the blocks among which a tile's keys are divided, as launch_fattn chooses them."""
    wave = processors * at_once
    chosen = min(at_once, key_tiles)
    best, best_waves = 0, 0
    for parts in range(chosen, key_tiles + 1):
        waves = ceil(tiles * parts / wave)
        if best >= GOOD_PERCENT and waves > best_waves:
            break
        if (percent := 100 * tiles * parts // (waves * wave)) > best:
            chosen, best, best_waves = parts, percent, waves
    return chosen


def _plain(tensors: Iterable[TensorSpec]) -> list[TensorSpec]:
    return [tensor for tensor in tensors if tensor.tensor_type in SIXTEEN_BIT]


def _quantized(rows: int, width: int) -> int:
    return rows * padded(width, ROW_PADDING) // BLOCK_VALUES * BLOCK_BYTES


def _widest(tensors: Iterable[TensorSpec]) -> int:
    """Return the most inputs of a row."""
    return max((tensor.shape[-1] for tensor in tensors), default=0)


def _tallest(tensors: Iterable[TensorSpec]) -> int:
    """Return the most outputs."""
    return max((tensor.shape[-2] for tensor in tensors), default=0)


def _largest(tensors: Iterable[TensorSpec]) -> int:
    """Return the values of the largest matrix."""
    return max((tensor.n_elements for tensor in tensors), default=0)


def _largest_expert(tensors: Iterable[TensorSpec]) -> int:
    """Return the values of the largest matrix of one expert; one at a time is converted."""
    return max((tensor.shape[-1] * tensor.shape[-2] for tensor in tensors), default=0)
