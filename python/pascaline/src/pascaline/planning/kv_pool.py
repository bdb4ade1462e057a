"""Size of the KV pool: bytes of one token, and how many tokens the settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.errors import ConfigurationError
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

ELEMENT_BYTES = {"fp16": 2.0, "bf16": 2.0, "fp32": 4.0, "fp8_e5m2": 1.0, "int8": 1.0}
SCALE_BYTES = 2
"""An int8 pool keeps one fp16 scale per token and KV head, for keys and for values."""
UNPLANNED_POOL_BYTES = 2**30
"""Pool on the CPU that nobody gave a size: small beside a host's memory, and enough for a few requests."""


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> int:
    """Return the bytes that one token takes in the pool, all layers together.

    2 (key and value) * layers * KV heads * head size * bytes of an element; per layer where layers differ.
    """
    heads = spec.layer_kv_heads or (spec.num_kv_heads,) * spec.num_hidden_layers
    element = ELEMENT_BYTES[dtype]
    scales = 2 * SCALE_BYTES if dtype == "int8" else 0
    return int(sum(count * ((spec.head_dim + spec.v_head_dim) * element + scales) for count in heads))


def pool_tokens(settings: Settings, spec: ModelSpec, context_length: int, dtype: str) -> int:
    """Return the tokens of the pool: as set, else room for every running request, within UNPLANNED_POOL_BYTES.

    Raises ConfigurationError where the pool could not hold one request.
    """
    per_token = kv_bytes_per_token(spec, dtype)
    pool = settings.kv_cache
    if pool.max_tokens is not None:
        return pool.max_tokens
    if pool.max_bytes is not None:
        tokens = pool.max_bytes // per_token
        if tokens < context_length:
            raise ConfigurationError(
                f"kv_cache.max_bytes: {format_bytes(pool.max_bytes)} holds {tokens} tokens of this model "
                f"({format_bytes(per_token)} each) and cannot serve a {context_length}-token request, must be at least "
                f"{format_bytes(context_length * per_token)}; or lower context_length, "
                "choose a smaller kv_cache.dtype, "
                "or a model with fewer KV heads"
            )
        return tokens
    wanted = settings.max_running_requests * context_length
    return max(context_length, min(wanted, UNPLANNED_POOL_BYTES // per_token))
