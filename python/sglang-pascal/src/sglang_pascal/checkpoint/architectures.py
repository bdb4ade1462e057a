"""The supported architectures: tensor names, and what llama.cpp's converter changes in the values.

Names: gguf-py's `TENSOR_NAMES`. Changes: llama.cpp's `convert_hf_to_gguf.py`, which
- reorders the rows of q and k of architecture `llama` so that each rotary pair is adjacent (the Hugging Face order
  keeps the two halves of a head apart); all others keep the Hugging Face order;
- adds 1 to every norm weight of Gemma, which multiplies by (1 + weight).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from gguf_acceptance.dimensions import ROPE_FREQS

from sglang_pascal.errors import CheckpointError

_COMMON_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORM: Final = _COMMON_LAYER | {"ffn_norm": "post_attention_layernorm"}
_QK_NORM: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORM: Final = _COMMON_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MODEL: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS: Final = ROPE_FREQS
"""Llama 3.x frequency factors; `config` turns them back into settings."""


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` maps to a Hugging Face model."""

    name: str
    model_type: str
    model_class: str
    """Value of `architectures` in config.json, which SGLang looks up."""
    layer_tensors: dict[str, str] = field(repr=False)
    """GGUF name inside `blk.N.` -> Hugging Face name inside `model.layers.N.`"""
    permuted: frozenset[str] = frozenset()
    """Layer tensors whose rows are in adjacent-pair rotary order."""
    norm_offset: float = 0.0
    """What the converter added to every norm weight."""
    other_model_types: tuple[str, ...] = ()
    """Further values of `model_type` in Hugging Face folders that have the same layers."""

    def hf_name(self, gguf_name: str) -> str | None:
        """Return a tensor's Hugging Face name; None for a tensor that is configuration, not a weight."""
        if gguf_name == ROPE_FACTORS:
            return None
        if match := _LAYER_TENSOR.fullmatch(gguf_name):
            layer, tensor, kind = match.groups()
            if tensor in self.layer_tensors:
                return f"model.layers.{layer}.{self.layer_tensors[tensor]}.{kind}"
        base, _, kind = gguf_name.rpartition(".")
        if base in _MODEL:
            return f"{_MODEL[base]}.{kind}"
        raise CheckpointError(
            f'tensor "{gguf_name}" is not part of architecture "{self.name}"; this variant of it is not supported'
        )

    def is_permuted(self, gguf_name: str) -> bool:
        """Whether the rows of this tensor must be put back into Hugging Face order."""
        match = _LAYER_TENSOR.fullmatch(gguf_name)
        return match is not None and match[2] in self.permuted

    def is_offset_norm(self, gguf_name: str) -> bool:
        """Whether `norm_offset` was added to this tensor."""
        return self.norm_offset != 0.0 and gguf_name.endswith("norm.weight")


ARCHITECTURES: Final = {
    arch.name: arch
    for arch in (
        Architecture(
            "llama",
            "llama",
            "LlamaForCausalLM",
            _PRE_NORM,
            frozenset({"attn_q", "attn_k"}),
            other_model_types=("mistral",),
        ),
        Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _PRE_NORM),
        Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _PRE_NORM | _QK_NORM),
        Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", _SANDWICH_NORM, norm_offset=1.0),
        Architecture(
            "gemma3",
            "gemma3_text",
            "Gemma3ForCausalLM",
            _SANDWICH_NORM | _QK_NORM,
            norm_offset=1.0,
            other_model_types=("gemma3",),
        ),
    )
}
"""By `general.architecture`. Mistral files name their architecture `llama`."""


def architecture_of(name: object) -> Architecture:
    """Return the architecture of that name. For any other name, the error lists the supported ones."""
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    supported = ", ".join(ARCHITECTURES)
    found = f'"{name}"' if name is not None else "missing"
    raise CheckpointError(f"general.architecture is {found}; supported are {supported} (Mistral files are llama)")
