"""Writes keys and values into a paged pool, fused with the rotary embedding and the norm of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from sglang_pascal.kernels.arguments import RopeAndStore
from sglang_pascal.kernels.build import HEAD_DIMS
from sglang_pascal.ops._call import FLOATS, INDICES, OperationError, address, is_half, is_long, launch, require
from sglang_pascal.reference import quantize_kv_ref, rms_norm_ref, rope_ref

_WARPS: Final = 4
_THREADS: Final = 128


@dataclass(frozen=True)
class KvPool:
    """Keys and values of one layer, one slot per token.

    The element type selects the format: float16; float8_e5m2 (or uint8, which holds its bytes in SGLang's pools); int8
    with scales. float32 only on the CPU.
    """

    keys: torch.Tensor
    """`[slots, kv_heads, head_dim]`."""
    values: torch.Tensor
    """Like keys."""
    key_scales: torch.Tensor | None = None
    """float16 `[slots, kv_heads]`; int8 only."""
    value_scales: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """F16, E5M2 or INT8: a name in `kernels.build.KV_TYPES`."""
        kinds = {torch.float16: "F16", torch.float8_e5m2: "E5M2", torch.uint8: "E5M2", torch.int8: "INT8"}
        head_dim = self.keys.shape[-1]
        if head_dim not in HEAD_DIMS:
            raise OperationError(
                f"no attention kernel for a head_dim of {head_dim}, must be {', '.join(map(str, HEAD_DIMS))}; "
                "choose attention_backend pascal_torch (SGLang's --attention-backend), which takes any, more slowly"
            )
        if self.keys.dtype not in kinds:
            dtype = str(self.keys.dtype).removeprefix("torch.")
            raise OperationError(
                f"no attention kernel for a KV cache of {dtype}, must be float16, float8_e5m2 or int8; choose "
                "kv_cache.dtype (SGLang's --kv-cache-dtype) auto with dtype (--dtype) float16, or fp8_e5m2, or int8"
            )
        return kinds[self.keys.dtype]

    def check(self) -> None:
        """Refuse tensors that do not fit together."""
        require("pool.values", self.values, (self.keys.dtype,), tuple(self.keys.shape), self.keys)
        require("pool.keys", self.keys, (self.keys.dtype,), (None, None, None), self.keys)
        for name, scales in (("key_scales", self.key_scales), ("value_scales", self.value_scales)):
            if (scales is not None) != (self.keys.dtype == torch.int8):
                raise OperationError(f"pool.{name} must be given for an int8 pool, and for no other")
            if scales is not None:
                require(f"pool.{name}", scales, (torch.float16,), tuple(self.keys.shape[:2]), self.keys)


_POOL_TYPES: Final = {"F16": 0, "E5M2": 1, "INT8": 2}
"""PoolType of kv_cache.cu."""


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: KvPool,
    *,
    is_neox: bool,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise (optional) and rotate queries and keys; write keys and values to their slots; return the queries.

    qkv: `[n, (heads + 2 kv_heads) * D]`, float16 or float32. positions, slots: `[n]`; a negative slot is not written
    (padding of a CUDA graph). cos_sin: float32 `[max position, rotary_dim]`, cosines, then sines (SGLang's cache).
    is_neox: the halves are rotated against each other, otherwise neighbours. q_norm, k_norm: `[D]` weights of an RMS
    norm over each head, of the same type. Returns `[n, heads, D]`.
    """
    n, width = qkv.shape
    _, kv_heads, head_dim = pool.keys.shape
    heads = width // head_dim - 2 * kv_heads
    pool.check()
    require("qkv", qkv, FLOATS, (None, (heads + 2 * kv_heads) * head_dim), pool.keys)
    require("positions", positions, INDICES, (n,), qkv)
    require("slots", slots, INDICES, (n,), qkv)
    require("cos_sin", cos_sin, (torch.float32,), (None, None), qkv)
    norm_types = FLOATS if q_norm is None else (q_norm.dtype,)
    for name, norm, allowed in (("q_norm", q_norm, FLOATS), ("k_norm", k_norm, norm_types)):
        if norm is not None:
            require(name, norm, allowed, (head_dim,), qkv)
    if not qkv.is_cuda:
        q, k, v = torch.split(qkv.view(n, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
        q, k = (_norm_and_rotate(x, norm, eps, positions, cos_sin, is_neox) for x, norm in ((q, q_norm), (k, k_norm)))
        _store_on_cpu(pool, slots, k.to(qkv.dtype), v)
        return q.to(qkv.dtype)
    queries = qkv.new_empty(n, heads, head_dim)
    norm_is_half = int(any(norm is not None and norm.dtype == torch.float16 for norm in (q_norm, k_norm)))
    if n:
        launch(
            "kv_cache",
            "rope_and_store",
            _THREADS,
            (-(-n * (heads + 2 * kv_heads) // _WARPS), 1, 1),
            RopeAndStore(
                qkv=qkv.data_ptr(),
                positions=positions.data_ptr(),
                slots=slots.data_ptr(),
                cos_sin=cos_sin.data_ptr(),
                q_norm=address(q_norm),
                k_norm=address(k_norm),
                q_out=queries.data_ptr(),
                keys=pool.keys.data_ptr(),
                values=pool.values.data_ptr(),
                key_scales=address(pool.key_scales),
                value_scales=address(pool.value_scales),
                n=n,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rotary_dim=cos_sin.shape[1],
                is_neox=int(is_neox),
                pool_type=_POOL_TYPES[pool.kind],
                is_half=is_half(qkv),
                norm_is_half=norm_is_half,
                positions_are_64_bit=is_long(positions),
                slots_are_64_bit=is_long(slots),
                eps=eps,
            ),
            qkv,
            f"qkv {list(qkv.shape)}, {kv_heads} KV heads of {head_dim}",
        )
    return queries


def _norm_and_rotate(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    is_neox: bool,
) -> torch.Tensor:
    normed = x.float() if norm is None else rms_norm_ref(x, norm, eps)
    return rope_ref(normed, positions, cos_sin, is_neox=is_neox)


def _store_on_cpu(pool: KvPool, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    kept = slots >= 0
    where = slots[kept].long()
    for buffer, scales, x in ((pool.keys, pool.key_scales, keys), (pool.values, pool.value_scales, values)):
        if scales is not None:
            buffer[where], scales[where] = quantize_kv_ref(x[kept])
        elif buffer.element_size() == 1:  # torch cannot write to indices of an fp8 tensor, only to those of its bytes
            buffer.view(torch.uint8)[where] = x[kept].half().to(torch.float8_e5m2).view(torch.uint8)
        else:
            buffer[where] = x[kept].to(buffer.dtype)
