"""What a model is for, as its file says: to generate text, to embed it, or to rank documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Role

POOLINGS = ("none", "mean", "cls", "last", "rank")
"""Names of GGUF's `<arch>.pooling_type` by its number (llama.cpp, include/llama.h, enum llama_pooling_type)."""
LAST, RANK = "last", "rank"
ENCODERS = frozenset(
    {
        *(
            "bert",
            "nomic-bert",
            "nomic-bert-moe",
            "jina-bert-v2",
            "jina-bert-v3",
            "modern-bert",
            "neo-bert",
            "eurobert",
        ),
        *("gemma-embedding", "t5encoder", "xlm-roberta", "roberta", "new", "nomic_bert", "modernbert"),
    }
)
"""Architectures whose tokens attend to later ones too, by the names of GGUF files (llama.cpp, llama-arch.cpp) and of
config.json; a file may also say so by `<arch>.attention.causal`."""
_FOLDER_MODES = {
    "pooling_mode_lasttoken": LAST,
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
"""Keys of 1_Pooling/config.json, by which sentence-transformers describes an embedding model."""
_TEXTS = {
    "generate": "it generates text: nothing in it says how to pool an embedding",
    "embed": "it is an embedding model",
    "rerank": "it is a reranking model",
}


def folder_pooling(config: Mapping[str, Any]) -> str | None:
    """Return the pooling that a folder's 1_Pooling/config.json describes; None for one that is not known."""
    found = [name for key, name in _FOLDER_MODES.items() if config.get(key) is True]
    return found[0] if len(found) == 1 else None


def own_role(spec: ModelSpec) -> Role:
    """Return the role that the file gives the model."""
    if spec.pooling == RANK:
        return "rerank"
    return "embed" if spec.pooling is not None or not spec.causal else "generate"


def role_refusal(spec: ModelSpec, role: Role) -> str | None:
    """Return why a model cannot have a role, whatever the engine; None if it can."""
    own = own_role(spec)
    if own == role:
        return None
    said = f" (pooling {spec.pooling})" if spec.pooling else ""
    where = f" ({spec.architecture}.pooling_type)" if spec.format == "gguf" else " (1_Pooling/config.json)"
    return f"{_TEXTS[own]}{where if own == 'generate' else said}; set role to {own}, or take a model for role {role}"
