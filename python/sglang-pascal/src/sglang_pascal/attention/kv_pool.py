"""SGLang's paged KV pool with int8 storage: one float16 scale per token and KV head, in arrays beside the pool.

float16 and float8 are SGLang's own. int8 takes 1 + 2 / head_dim bytes per element, and is more exact than e5m2.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_pascal.ops.kv_cache import KvPool
from sglang_pascal.reference import quantize_kv_ref


class PascalKVPool(MHATokenToKVPool):  # type: ignore[misc]  # SGLang publishes no types
    """A pool `[slots, kv_heads, head_dim]` per layer, for keys and for values."""

    def _create_buffers_normal(self) -> None:
        """SGLang's buffers, and scales for int8: SGLang counts, moves and frees them under these names."""
        super()._create_buffers_normal()
        if self.dtype == torch.int8:
            shape = (self.size + self.page_size, self.head_num)
            self.k_scale_buffer, self.v_scale_buffer = (
                [torch.zeros(shape, dtype=torch.float16, device=self.device) for _ in range(self.layer_num)]
                for _ in range(2)
            )

    def _init_kv_copy_and_warmup(self) -> None:
        """Do nothing: with speculation, SGLang would launch a Triton copy here, but a chain never moves its slots."""
        self._kv_copy_config = None
        self.use_native_move_kv_cache = True

    def scales_of(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Scales `[slots, kv_heads]` of a layer's keys and values; None for a pool of floats."""
        if self.dtype != torch.int8:
            return None, None
        index = layer_id - self.start_layer
        return self.k_scale_buffer[index], self.v_scale_buffer[index]

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        *scales: Any,
        layer_id_override: int | None = None,
        **more: Any,
    ) -> None:
        """Write new keys and values `[n, kv_heads, head_dim]` to their slots."""
        if self.dtype != torch.int8:
            super().set_kv_buffer(
                layer, loc_info, cache_k, cache_v, *scales, layer_id_override=layer_id_override, **more
            )
            return
        slots, *_ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        index = layer_id - self.start_layer
        for buffers, scale_buffers, new in (
            (self.k_buffer, self.k_scale_buffer, cache_k),
            (self.v_buffer, self.v_scale_buffer, cache_v),
        ):
            values, new_scales = quantize_kv_ref(new)
            buffers[index][slots] = values
            scale_buffers[index][slots] = new_scales


def kv_of_layer(pool: Any, layer_id: int) -> KvPool:
    """Return the keys and values of a layer from that of SGLang's two pools which holds them."""
    if isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0:
        layer_id, is_swa = pool.layers_mapping[layer_id]
        pool = pool.swa_kv_pool if is_swa else pool.full_kv_pool
    keys, values = pool.get_kv_buffer(layer_id)
    return KvPool(keys, values, *pool.scales_of(layer_id))
