"""SGLang's attention backend with our kernels: the default on CUDA, `pascal_kernels` by name.

A decode step makes the same launches for all lengths, so that a CUDA graph can capture it. Nothing waits for the
device. On CPU tensors the operations use the reference: slow, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_pascal.attention.kv_pool import kv_of_layer
from sglang_pascal.attention.paged import is_decode, verified
from sglang_pascal.names import ATTENTION_BACKENDS
from sglang_pascal.ops.attention import Sequences, attention_decode, attention_prefill
from sglang_pascal.ops.kv_cache import rope_and_store

if TYPE_CHECKING:
    from sglang_pascal.ops.activations import Activations
    from sglang_pascal.ops.kv_cache import KvPool

NAME: Final = ATTENTION_BACKENDS[1]
"""Value of `--attention-backend`."""


class Rotation(NamedTuple):
    """Norm and rotation of queries and keys before they are stored."""

    positions: torch.Tensor
    cos_sin: torch.Tensor
    """float32 `[positions, rotary_dim]`."""
    is_neox: bool
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0


@dataclass
class _ForwardPlan:
    """Data that all layers of one forward pass share."""

    full: Sequences
    write_slots: torch.Tensor
    swa: Sequences | None = None
    """Slots in the numbering of the sliding-window pool."""
    swa_write_slots: torch.Tensor | None = None
    query_starts: torch.Tensor | None = None
    """int32 `[n + 1]`; None for a decode."""
    max_new: int = 1


class KernelAttentionBackend(AttentionBackend):  # type: ignore[misc]  # SGLang publishes no types
    """Dense multi-head and grouped-query attention, sliding window, logit soft cap; pools of fp16, e5m2 and int8."""

    needs_cpu_seq_lens = False
    is_decode = True
    """Whether the pass that was planned last is a decode step."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._context_length: int = runner.model_config.context_len
        pool = self.token_to_kv_pool
        self._swa_pool = pool if isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0 else None
        self._pools: dict[int, KvPool] = {}
        if str(runner.device).startswith("cuda"):
            _ = kv_of_layer(pool, getattr(pool, "start_layer", 0)).kind  # refuses now what no kernel reads
        self._plan: _ForwardPlan | None = None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate nothing: a captured step makes its own tensors in the graph's pool."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of the padding rows of a captured step."""
        return 1

    def support_triton(self) -> bool:
        """Return False: this backend has no Triton kernel."""
        return False

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Plan a pass anew: SGLang calls this in each warm-up of a graph, and again during the capture.

        If several tokens of a request are verified, each is a sequence of its own, one position longer than the one
        before: its result equals that of a decode step of that token, bit for bit.
        """
        table, requests = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        width, lengths = verified(forward_batch)
        plan = _ForwardPlan(Sequences(table, _repeated(requests, width), lengths), forward_batch.out_cache_loc)
        if self._swa_pool is not None:
            slots = self._swa_pool.translate_loc_from_full_to_swa(table[requests, : self._context_length])
            rows = torch.arange(len(requests), device=slots.device)
            plan.swa = Sequences(slots.clamp(min=0).int(), _repeated(rows, width), lengths)
            plan.swa_write_slots = self._swa_pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
        self.is_decode = is_decode(forward_batch.forward_mode)
        if not self.is_decode:
            plan.query_starts = _starts(forward_batch.extend_seq_lens)
            plan.max_new = max(forward_batch.extend_seq_lens_cpu)
        self._plan = plan

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """SGLang's hook. One new token per request: q `[n, heads * D]` -> `[n, heads * D]`."""
        return self._after_rotation(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> torch.Tensor:
        """SGLang's hook. New tokens after their cached prefixes: q `[tokens, heads * D]` -> `[tokens, heads * D]`."""
        return self._after_rotation(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_fused(
        self, qkv: torch.Tensor, rotation: Rotation, layer: Any, *, quantized: bool, is_16_bit: bool
    ) -> torch.Tensor | Activations:
        """Norm, rotate, store and attend, from qkv `[n, (heads + 2 kv_heads) * D]` as the projection made it.

        quantized: return a decode's result as the output projection multiplies it, in 8 or 16 bits. A prefill's result
        is never quantised.
        """
        plan = self._planned()
        slots = plan.swa_write_slots if self._is_swa(layer) else plan.write_slots
        assert slots is not None
        query = rope_and_store(
            qkv,
            rotation.positions,
            slots,
            rotation.cos_sin,
            self._pool(layer),
            is_neox=rotation.is_neox,
            q_norm=rotation.q_norm,
            k_norm=rotation.k_norm,
            eps=rotation.eps,
        )
        return self._attend(query, layer, quantized=quantized, is_16_bit=is_16_bit)

    def _after_rotation(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        if layer.is_cross_attention:
            raise NotImplementedError("attention backend 'pascal' serves decoder-only text models: no cross attention")
        if save_kv_cache and k is not None:
            slots = KVWriteLoc(forward_batch.out_cache_loc, self._planned().swa_write_slots)
            self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim).contiguous()
        result = self._attend(query, layer)
        assert isinstance(result, torch.Tensor)
        return result

    def _attend(
        self, query: torch.Tensor, layer: Any, *, quantized: bool = False, is_16_bit: bool = False
    ) -> torch.Tensor | Activations:
        plan = self._planned()
        sequences = plan.swa if self._is_swa(layer) else plan.full
        assert sequences is not None
        scale, soft_cap = float(layer.scaling), float(layer.logit_cap or 0.0)
        window = layer.sliding_window_size if layer.sliding_window_size > -1 else None
        pool = self._pool(layer)
        if plan.query_starts is None:
            return attention_decode(
                query,
                pool,
                sequences,
                scale=scale,
                max_length=self._context_length,
                window=window,
                soft_cap=soft_cap,
                quantized=quantized,
                is_16_bit=is_16_bit,
            )
        return attention_prefill(
            query,
            pool,
            sequences,
            plan.query_starts,
            scale=scale,
            max_new=plan.max_new,
            window=window,
            soft_cap=soft_cap,
        )

    def _planned(self) -> _ForwardPlan:
        assert self._plan is not None, "SGLang plans a pass before its first layer"
        return self._plan

    def _is_swa(self, layer: Any) -> bool:
        """Whether the layer's keys and values are in the sliding-window pool."""
        return self._swa_pool is not None and self._swa_pool.layers_mapping[layer.layer_id][1]

    def _pool(self, layer: Any) -> KvPool:
        layer_id = layer.layer_id
        if layer_id not in self._pools:
            self._pools[layer_id] = kv_of_layer(self.token_to_kv_pool, layer_id)
        return self._pools[layer_id]


def _repeated(values: torch.Tensor, width: int) -> torch.Tensor:
    """Return `[n * width]`, contiguous: each of `[n]` width times, without a wait for the device."""
    return values.repeat_interleave(width, output_size=len(values) * width) if width > 1 else values


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Return int32 `[n + 1]` for `[n]`: the start of each sequence, and the end of the last."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
    return starts


def create_backend(runner: Any) -> KernelAttentionBackend:
    """Make the backend; SGLang's registry calls this."""
    return KernelAttentionBackend(runner)
