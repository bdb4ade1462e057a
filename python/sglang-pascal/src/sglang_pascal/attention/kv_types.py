"""Adds `--kv-cache-dtype int8`, and fp8_e5m2 on the CPU, to SGLang.

Each function wraps the function of SGLang that its docstring names; `compat` installs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

INT8: Final = "int8"
"""Value of `--kv-cache-dtype`."""
SCALE_BYTES: Final = 2
"""Bytes of the scale of a key or value, a float16."""


@dataclass(frozen=True)
class KvType:
    """How a pool stores one key or value."""

    element_bytes: int
    scale_bytes: int = 0
    """Bytes of the scale of each key and each value, per token and head."""


KV_TYPES: Final = {
    "float16": KvType(2),
    "bfloat16": KvType(2),
    "float32": KvType(4),
    "fp8_e5m2": KvType(1),
    INT8: KvType(1, SCALE_BYTES),
}
"""Type of a pool -> its layout. The first three are the type of the computation (`--kv-cache-dtype auto`)."""


def kv_cache_choices() -> list[str]:
    """The list of values that SGLang's `--kv-cache-dtype` allows, to be changed in place."""
    from typing import get_type_hints

    from sglang.srt.server_args import ServerArgs

    hint = get_type_hints(ServerArgs, include_extras=True)["kv_cache_dtype"]
    choices: list[str] = hint.__metadata__[0].choices
    return choices


def configure_kv_cache_dtype(
    original: Callable[..., tuple[str | None, torch.dtype]], *, server_args_kv_cache_dtype: str, **more: Any
) -> tuple[str | None, torch.dtype]:
    """Around SGLang's function of that name: (name, type of the pool)."""
    if server_args_kv_cache_dtype == INT8:
        return INT8, torch.int8
    if server_args_kv_cache_dtype == "fp8_e5m2":  # SGLang refuses it on the CPU, for its own kernels' sake
        return None, torch.float8_e5m2
    return original(server_args_kv_cache_dtype=server_args_kv_cache_dtype, **more)


def compute_cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Around `DefaultPoolConfigurator._compute_cell_size`: bytes of one token in all layers, with its scales."""
    return original(self, kvc, num_layers) + num_layers * _scale_bytes(kvc, kvc.model_config.get_num_kv_heads)


def add_scales_to_hybrid_sizes(result: Any, self: Any, kvc: Any) -> None:
    """After `HybridSWAPoolConfigurator.__init__`: bytes of one token in a full and in a sliding-window layer."""
    del result
    self._full_per_token += _scale_bytes(kvc, kvc.model_config.get_num_kv_heads)
    self._swa_per_token += _scale_bytes(kvc, kvc.model_config.get_swa_num_kv_heads)
    self._recompute_cell_size()


def _scale_bytes(kvc: Any, num_kv_heads: Callable[[int], int]) -> int:
    """Bytes of the scales of one token in one layer: of a key and of a value per head."""
    from sglang.srt.runtime_context import get_parallel

    if kvc.kv_cache_dtype != torch.int8:
        return 0
    return 2 * num_kv_heads(get_parallel().attn_tp_size) * SCALE_BYTES
