"""What differs between the layers of a model: which use a sliding window, which keep a KV cache."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def sliding_layer_ids(num_layers: int, period: int, *, full_layer_first: bool = False) -> tuple[int, ...]:
    """The sliding-window layers where one in `period` layers is full: the last of each period, or the first.

    A period of 0 means that all layers slide, of 1 that none does (llama.cpp, `llama_hparams::set_swa_pattern`).
    """
    if period == 0:
        return tuple(range(num_layers))
    full = 0 if full_layer_first else period - 1
    return tuple(layer for layer in range(num_layers) if layer % period != full)


def most_common_heads(layer_heads: Sequence[int]) -> int:
    """Heads of most of the layers that have any; 0 where none has."""
    counts = Counter(heads for heads in layer_heads if heads)
    return counts.most_common(1)[0][0] if counts else 0


def differing(layer_values: Sequence[int]) -> tuple[int, ...] | None:
    """The values of all layers if they differ, else None."""
    return tuple(layer_values) if len(set(layer_values)) > 1 else None
