"""SGLang's attention backend over `paged`: the default on the CPU, `pascal_torch` by name.

On CUDA a decode step has static shapes (the whole context length, masked), so that a CUDA graph can capture it. On the
CPU, which has no graphs, a step reads only up to its longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_pascal.attention import paged
from sglang_pascal.attention.kv_pool import kv_of_layer
from sglang_pascal.names import ATTENTION_BACKENDS

if TYPE_CHECKING:
    from sglang_pascal.attention.paged import Rectangle

NAME: Final = ATTENTION_BACKENDS[2]
"""Value of `--attention-backend`."""
_View = tuple[int | None, bool]
"""Sliding window in positions (None = none), and whether the layer's pool is the sliding-window one."""


@dataclass
class _ForwardPlan:
    """Data that all layers of one forward pass share; the first layer that needs it fills it."""

    swa_write_slots: torch.Tensor | None = None
    decode_slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """`[n, L]` slots of each request, from position 0."""
    decode_lengths: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """`[n * width]`, of each row with its own token."""
    width: int = 1
    """Rows of each request."""
    decode: dict[_View, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    prefill: dict[_View, list[Rectangle]] = field(default_factory=dict)


class PascalAttentionBackend(AttentionBackend):  # type: ignore[misc]  # SGLang publishes no types
    """Dense multi-head and grouped-query attention, sliding window, logit soft cap, any KV dtype."""

    needs_cpu_seq_lens = False
    is_decode = True
    """Whether the pass that was planned last is a decode step."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._context_length: int = runner.model_config.context_len
        self._is_cpu = torch.device(runner.device).type == "cpu"
        pool = self.token_to_kv_pool
        self._swa_pool = pool if isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0 else None
        self._plan = _ForwardPlan()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate nothing: a captured step makes its own tensors in the graph's pool."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of the padding rows of a captured step."""
        return 1

    def support_triton(self) -> bool:
        """Return False: this backend has no Triton kernel."""
        return False

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Forget the last pass; the first layer of this one plans anew.

        SGLang calls this in each warm-up of a graph, and again during the capture: the graph must not read what a
        warm-up computed, and each replay must compute it again.
        """
        self._plan, self.is_decode = _ForwardPlan(), paged.is_decode(forward_batch.forward_mode)
        if self.is_decode:
            plan = self._plan
            plan.width, plan.decode_lengths = paged.verified(forward_batch)
            plan.decode_slots = self._slots(forward_batch, self._decode_columns(plan.decode_lengths))

    def _decode_columns(self, seq_lens: torch.Tensor) -> int:
        """Return the number of positions that a decode step reads: the longest sequence on the CPU, all on a device."""
        if not self._is_cpu:
            return self._context_length
        return max(1, int(seq_lens.max())) if len(seq_lens) else 1

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """Attend from `width` new tokens of each request: q `[n * width, heads * D]` -> `[n * width, heads * Dv]`."""
        self._refuse_unsupported(layer)
        if save_kv_cache and k is not None:
            self._store(layer, forward_batch, k, v)
        slots, mask = self._decode_view(layer)
        query = q.reshape(-1, self._plan.width, layer.tp_q_head_num, layer.qk_head_dim)
        return self._attend(query, slots, mask, layer).flatten(0, 1).flatten(1)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """Attend from new tokens after their cached prefixes: q `[tokens, heads * D]` -> `[tokens, heads * Dv]`."""
        if self.is_decode:  # SGLang takes a verification for an extension
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        self._refuse_unsupported(layer)
        if save_kv_cache and k is not None:
            self._store(layer, forward_batch, k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output: torch.Tensor = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        for part in self._prefill_view(layer, forward_batch):
            result = self._attend(query[part.rows], part.slots, part.mask, layer).flatten(0, 1)
            rows = part.rows.flatten()
            if part.real_rows is not None:
                rows, result = rows[part.real_rows], result[part.real_rows]
            output[rows] = result
        return output.view(query.shape[0], -1)

    def _attend(self, query: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor, layer: Any) -> torch.Tensor:
        kv = kv_of_layer(self.token_to_kv_pool, layer.layer_id)
        keys = paged.gather(kv.keys, slots, query.dtype, kv.key_scales)
        values = paged.gather(kv.values, slots, query.dtype, kv.value_scales)
        return paged.attend(query, keys, values, mask, scaling=layer.scaling, soft_cap=layer.logit_cap)

    def _decode_view(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        plan, view = self._plan, self._view(layer)
        if view not in plan.decode:
            slots, mask = paged.plan_decode(plan.decode_slots, plan.decode_lengths, view[0])
            plan.decode[view] = (self._translated(slots, view), mask)
        return plan.decode[view]

    def _prefill_view(self, layer: Any, forward_batch: Any) -> list[Rectangle]:
        plan, view = self._plan, self._view(layer)
        if view not in plan.prefill:
            parts = paged.plan_prefill(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.extend_prefix_lens_cpu,
                forward_batch.extend_seq_lens_cpu,
                view[0],
            )
            plan.prefill[view] = [
                paged.Rectangle(part.rows, self._translated(part.slots, view), part.mask, part.real_rows)
                for part in parts
            ]
        return plan.prefill[view]

    def _view(self, layer: Any) -> _View:
        window = layer.sliding_window_size if layer.sliding_window_size > -1 else None
        is_swa = self._swa_pool is not None and self._swa_pool.layers_mapping[layer.layer_id][1]
        return window, is_swa

    def _slots(self, forward_batch: Any, length: int) -> torch.Tensor:
        table: torch.Tensor = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, :length]
        return table

    def _translated(self, slots: torch.Tensor, view: _View) -> torch.Tensor:
        """Return the slots in the layer's pool: the sliding-window pool has its own numbering."""
        if self._swa_pool is None or not view[1]:
            return slots
        translated: torch.Tensor = self._swa_pool.translate_loc_from_full_to_swa(slots)
        return translated.clamp(min=0).long()

    def _store(self, layer: Any, forward_batch: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        slots, plan = forward_batch.out_cache_loc, self._plan
        if self._swa_pool is not None and plan.swa_write_slots is None:
            plan.swa_write_slots = self._swa_pool.translate_loc_from_full_to_swa(slots)
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots, plan.swa_write_slots), k, v)

    def _refuse_unsupported(self, layer: Any) -> None:
        if layer.is_cross_attention:
            raise NotImplementedError("attention backend 'pascal' serves decoder-only text models: no cross attention")


def create_backend(runner: Any) -> PascalAttentionBackend:
    """Make the backend; SGLang's registry calls this."""
    return PascalAttentionBackend(runner)
