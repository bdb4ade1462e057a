"""What differs between the layers of a model: which use a sliding window, which keep a KV cache."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_BLOCK = re.compile(r"blk\.(\d+)\.([^.]+)")
_STATE_PARTS = ("ssm_", "shortconv", "time_mix_")
"""Tensors of layers with a recurrent state: Mamba and gated delta, short convolutions, RWKV (gguf-py, constants.py)."""
_KEY_PARTS = frozenset({"attn_k", "attn_k_b", "attn_kv_b", "attn_kv_a_mqa"})
"""Tensors that make keys: a layer with one of them has cells in the KV cache."""
_FUSED_KEYS = "attn_qkv"
"""Makes keys too, unless it feeds a gated delta layer."""


def sliding_layer_ids(num_layers: int, period: int, *, full_layer_first: bool = False) -> tuple[int, ...]:
    """The sliding-window layers if one in `period` layers is full: the last of each period, or the first.

    A period of 0 means that all layers slide, 1 that none does (llama.cpp, `llama_hparams::set_swa_pattern`).
    """
    if period == 0:
        return tuple(range(num_layers))
    full = 0 if full_layer_first else period - 1
    return tuple(layer for layer in range(num_layers) if layer % period != full)


def most_common_heads(layer_heads: Sequence[int]) -> int:
    """The most common number of heads among layers that have any; 0 if none has."""
    counts = Counter(heads for heads in layer_heads if heads)
    return counts.most_common(1)[0][0] if counts else 0


def differing(layer_values: Sequence[int]) -> tuple[int, ...] | None:
    """The values of all layers if they differ, else None."""
    return tuple(layer_values) if len(set(layer_values)) > 1 else None


def layer_parts(names: Iterable[str], num_layers: int) -> list[frozenset[str]]:
    """Return the tensors of each layer: the part of their names after `blk.N.`."""
    found: list[set[str]] = [set() for _ in range(num_layers)]
    for name in names:
        match = _BLOCK.match(name)
        if match and int(match[1]) < num_layers:
            found[int(match[1])].add(match[2])
    return [frozenset(parts) for parts in found]


def has_state(parts: frozenset[str]) -> bool:
    """Whether a layer with these tensors keeps a recurrent state."""
    return any(part.startswith(_STATE_PARTS) for part in parts)


def has_keys(parts: frozenset[str]) -> bool:
    """Whether a layer with these tensors stores keys and values. Falcon-H1's layers store them and keep a state too."""
    return bool(parts & _KEY_PARTS) or (_FUSED_KEYS in parts and not has_state(parts))
