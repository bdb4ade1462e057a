"""Which tensors a folder of safetensors must hold: SGLang leaves a parameter without a tensor uninitialised.

The names are those of transformers' modelling code (modeling_llama.py and so on), which SGLang's loaders expect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_COMMON = ("input_layernorm.weight", *_ATTENTION, "post_attention_layernorm.weight", *_MLP)
_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_GEMMA_NORMS = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
LAYER_TENSORS = {
    "llama": _COMMON,
    "mistral": _COMMON,
    "qwen2": (*_COMMON, *_BIASES),
    "qwen3": (*_COMMON, *_HEAD_NORMS),
    "gemma2": (*_COMMON, *_GEMMA_NORMS),
    "gemma3": (*_COMMON, *_HEAD_NORMS, *_GEMMA_NORMS),
    "gemma3_text": (*_COMMON, *_HEAD_NORMS, *_GEMMA_NORMS),
}
"""`model_type` -> tensors of each layer."""


def missing_tensors(spec: ModelSpec) -> list[str]:
    """Return the tensors that the folder's architecture needs and no shard holds, in the model's order."""
    held = {tensor.name for tensor in spec.tensors}
    embedding = next((name for name in held if name.endswith(f".{EMBEDDING}") and "vision" not in name), None)
    prefix = embedding.removesuffix(EMBEDDING) if embedding else "model."
    wanted = [f"{prefix}{EMBEDDING}"]
    for layer in range(spec.num_hidden_layers):
        wanted += [f"{prefix}layers.{layer}.{name}" for name in LAYER_TENSORS.get(spec.architecture, ())]
    wanted.append(f"{prefix}norm.weight")
    missing = [name for name in wanted if name not in held]
    if spec.ties_embeddings is False and not any(name.endswith(HEAD) for name in held):
        missing.append(HEAD)
    return missing
