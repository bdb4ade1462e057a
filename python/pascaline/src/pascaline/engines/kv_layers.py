"""The layers of a model that have a KV cache, and the bytes that one token takes in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KvType:
    """A type of a stored key or value."""

    value_bytes: float
    """Bytes of one number; of a block format its share of the block."""
    scale_bytes: int = 0
    """Bytes of the scales of one token and KV head, keys and values together, that the engine stores besides."""
    flag: str = ""
    """The engine's own name, as its flags have it."""
    added_perplexity: float = 0.0
    """What it adds to the perplexity: estimated; 0 for a type that no smaller one could replace without loss."""
    can_be_set: bool = True
    """Whether kv_cache.dtype may name it; if not, it is what `auto` becomes."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that store the same number of values per token: how many layers, and the values of one token in one."""

    layers: int
    heads: int
    head_dim: int
    v_head_dim: int
    sliding: bool

    def token_bytes(self, kind: KvType) -> float:
        """Bytes of one token in all these layers."""
        values = self.heads * (self.head_dim + self.v_head_dim)
        return self.layers * (values * kind.value_bytes + kind.scale_bytes * self.heads)

    def words(self, kind: KvType) -> str:
        """The calculation of one token."""
        dims = f"2 x {self.head_dim}" if self.head_dim == self.v_head_dim else f"({self.head_dim} + {self.v_head_dim})"
        scale = f" + {kind.scale_bytes} B of scales" if kind.scale_bytes else ""
        return f"{self.layers} layers x {self.heads} KV heads x ({dims} x {kind.value_bytes:g} B{scale})"


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
