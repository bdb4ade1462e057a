"""The recurrent states of a model's layers without attention, as llama.cpp keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.models.spec import ModelSpec

STATE_ELEMENT_BYTES = 4
"""llama.cpp keeps recurrent states in fp32 (llama-model.cpp, create_memory)."""
TOKEN_SHIFTS = 2
"""RWKV's default of token_shift_count (llama-model.cpp)."""


def recurrent_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one request's recurrent state in fp32, summed over the layers that have one."""
    return STATE_ELEMENT_BYTES * len(_state_layers(spec)) * _state_values(spec)


def _state_layers(spec: ModelSpec) -> Sequence[int]:
    """Return the layers with a state, found by their tensors; if those are unknown, the layers without KV heads."""
    if spec.state_layer_ids:
        return spec.state_layer_ids
    heads = spec.layer_kv_heads or (0,) * spec.num_hidden_layers
    return [layer for layer, count in enumerate(heads) if count == 0]


def _state_values(spec: ModelSpec) -> int:
    """Return the values that one layer keeps for one request (llama.cpp, llama-hparams.cpp: n_embd_r + n_embd_s)."""
    if spec.wkv_head_size:
        return spec.hidden_size * ((spec.token_shift_count or TOKEN_SHIFTS) + spec.wkv_head_size)
    if spec.shortconv_columns:
        return spec.hidden_size * (spec.shortconv_columns - 1)
    kept = max(0, (spec.ssm_conv_kernel or 1) - 1)
    if spec.kda_head_dim:
        return spec.num_heads * spec.kda_head_dim * (3 * kept + spec.kda_head_dim)
    if not spec.ssm_state_size or not spec.ssm_inner_size:
        return 0
    channels = spec.ssm_inner_size + 2 * (spec.ssm_num_groups or 0) * spec.ssm_state_size
    return kept * channels + spec.ssm_state_size * spec.ssm_inner_size
