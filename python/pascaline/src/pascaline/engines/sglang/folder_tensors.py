"""Which tensors a folder of safetensors must hold: SGLang leaves a parameter without a tensor uninitialised.

The names are those of transformers' modelling code (modeling_llama.py and so on), which SGLang's loaders expect; the
plugin knows them, because it translates the names in GGUF files into them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
LAYER_TENSORS = {name: architecture.layer_tensors for name, architecture in PLUGIN.model_types.items()}
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
