"""The arguments of every kernel: one definition each, by C's names and in C's order.

A launch fills one and hands its bytes to the driver, so a wrong size or order would be read as other values. A test
without a GPU compares each block with the names in the source, and with the sizes and offsets in the compiled PTX.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_ulonglong, c_void_p
from typing import Any, ClassVar, Final


def _addresses(*names: str) -> list[tuple[str, type[Any]]]:
    return [(name, c_void_p) for name in names]


def _ints(*names: str) -> list[tuple[str, type[Any]]]:
    return [(name, c_int) for name in names]


class Block(ctypes.Structure):
    """Arguments of a kernel. A field that is left out is 0; a test holds that every launch names all of them."""

    is_struct: ClassVar[bool]
    """Whether the kernel takes one struct; otherwise it takes a parameter for each field, laid out alike."""
    n_bytes: ClassVar[int]
    """Bytes that the kernel reads: a struct with the padding at its end, parameters up to the last one."""


def _struct(block: type[Block]) -> type[Block]:
    block.is_struct, block.n_bytes = True, ctypes.sizeof(block)
    return block


def _parameters(block: type[Block]) -> type[Block]:
    last: Any = getattr(block, block._fields_[-1][0])
    block.is_struct, block.n_bytes = False, last.offset + last.size
    return block


_SEQUENCES = ("q", "keys", "values", "key_scales", "value_scales", "req_to_token", "requests", "lengths")


@_struct
class AttentionDecode(Block):
    """attention_decode.cu."""

    _fields_ = (
        *_addresses(*_SEQUENCES, "partial", "partial_stats"),
        ("stride", c_longlong),
        *_ints("heads", "kv_heads", "window", "q_is_half", "requests_are_64_bit", "lengths_are_64_bit"),
        ("scale", c_float),
        ("soft_cap", c_float),
    )


@_struct
class AttentionCombine(Block):
    """attention_combine.cu."""

    _fields_ = (
        *_addresses("partial", "partial_stats", "lengths", "out", "q", "scales"),
        *_ints("splits", "window", "out_is_half", "lengths_are_64_bit", "K", "is_16_bit"),
    )


@_struct
class AttentionPrefill(Block):
    """attention_prefill.cu."""

    _fields_ = (
        *_addresses(*_SEQUENCES, "query_starts", "out"),
        ("stride", c_longlong),
        *_ints("heads", "kv_heads", "window", "is_half", "requests_are_64_bit", "lengths_are_64_bit"),
        ("scale", c_float),
        ("soft_cap", c_float),
    )


@_struct
class QuantizedProduct(Block):
    """matmul.cuh: decode_matmul.cu and tile_matmul.cu."""

    _fields_ = (
        *_addresses("weights", "x", "x_scales", "y", "bias", "residual", "partials", "tickets"),
        ("y_stride", c_longlong),
        ("residual_stride", c_longlong),
        *_ints("rows", "n_tiles", "n_steps", "n", "y_is_half", "splits", "low"),
    )


@_struct
class HalfProduct(Block):
    """half_matmul.cu."""

    _fields_ = (
        *_addresses("weights", "x", "y", "bias"),
        ("y_stride", c_longlong),
        *_ints("rows", "columns", "n", "y_is_half"),
    )


@_struct
class RopeAndStore(Block):
    """kv_cache.cu."""

    _fields_ = (
        *_addresses("qkv", "positions", "slots", "cos_sin", "q_norm", "k_norm", "q_out"),
        *_addresses("keys", "values", "key_scales", "value_scales"),
        *_ints("n", "heads", "kv_heads", "head_dim", "rotary_dim", "is_neox", "pool_type"),
        *_ints("is_half", "norm_is_half", "positions_are_64_bit", "slots_are_64_bit"),
        ("eps", c_float),
    )


@_parameters
class Quantize(Block):
    """quantize.cu: quantize, silu_mul_quantize."""

    _fields_ = (*_addresses("x", "q", "scales"), *_ints("x_is_half", "columns", "K", "low"))


@_parameters
class RmsNormQuantize(Block):
    """quantize.cu: rms_norm_quantize."""

    _fields_ = (
        *_addresses("x", "residual", "weight", "y", "q", "scales"),
        ("eps", c_float),
        *_ints("x_is_half", "weight_is_half", "columns", "K", "low"),
    )


@_parameters
class Repack(Block):
    """repack.cu: repack, unrepack."""

    _fields_ = (
        *_addresses("in_", "out"),  # `in` is a keyword of Python
        *_ints("rows", "row_bytes", "n_records"),
        ("n_units", c_ulonglong),
    )


@_parameters
class Dequantize(Block):
    """repack.cu: dequantize."""

    _fields_ = (
        *_addresses("weights", "ids", "out"),
        *_ints("ids_are_64_bit", "out_is_half", "rows", "n_steps", "columns"),
    )


@_parameters
class ArgMax(Block):
    """sampling.cu: argmax."""

    _fields_ = (*_addresses("logits", "out"), *_ints("logits_are_half", "vocabulary"))


@_parameters
class TopKTopPFilter(Block):
    """sampling.cu: top_k_top_p_filter."""

    _fields_ = (*_addresses("probabilities", "top_k", "top_p", "min_p"), *_ints("vocabulary"))


@_parameters
class Probe(Block):
    """probe.cu: every probe of an instruction."""

    _fields_ = (*_addresses("clocks", "sink"),)


@_parameters
class ProbeStream(Block):
    """probe.cu: probe_stream."""

    _fields_ = (*_addresses("data", "sink"), ("count", c_ulonglong))


BLOCKS: Final[dict[str, type[Block]]] = {
    "argmax": ArgMax,
    "attention_combine": AttentionCombine,
    "attention_decode_": AttentionDecode,
    "attention_prefill_": AttentionPrefill,
    "decode_matmul_": QuantizedProduct,
    "dequantize_": Dequantize,
    "half_matmul_": HalfProduct,
    "probe_": Probe,
    "probe_stream": ProbeStream,
    "quantize": Quantize,
    "repack_": Repack,
    "rms_norm_quantize": RmsNormQuantize,
    "rope_and_store": RopeAndStore,
    "silu_mul_quantize": Quantize,
    "tile_matmul_": QuantizedProduct,
    "top_k_top_p_filter": TopKTopPFilter,
    "unrepack_": Repack,
}
"""A kernel's name, or its beginning up to what it is compiled for -> its arguments."""


def block_of(kernel: str) -> type[Block]:
    """Return the arguments of a kernel. Raises KeyError if its name has no row in BLOCKS."""
    if kernel in BLOCKS:
        return BLOCKS[kernel]
    (beginning,) = [name for name in BLOCKS if name.endswith("_") and kernel.startswith(name)] or [kernel]
    return BLOCKS[beginning]
