"""GGUF metadata -> the contents of config.json and generation_config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from gguf_acceptance.dimensions import one_for_all
from gguf_acceptance.keys import DEFAULTS
from gguf_acceptance.rope import DEFAULT_BASE, RopeError, llama3_scaling, rope_scaling
from gguf_acceptance.vocabulary import end_ids, special_id

from sglang_pascal.checkpoint.architectures import ROPE_FACTORS, Architecture, architecture_of
from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from sglang_pascal.checkpoint.gguf_file import GgufFile

GEMMA_27B_LAYERS: Final = {"gemma2": 46, "gemma3": 62}
"""The 27B models scale queries by hidden_size / heads, all others by head_dim; recognised by their layer count."""


@dataclass(frozen=True)
class _Metadata:
    """Typed access to the keys of one architecture."""

    values: dict[str, Any]
    prefix: str

    def get(self, key: str, default: Any = None) -> Any:
        default = DEFAULTS.get(self.prefix, {}).get(key, default)
        return self.values.get(f"{self.prefix}.{key}", default)

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f'"{self.prefix}.{key}" is missing in the file\'s metadata; convert the model again')
        return value

    def require_one(self, key: str) -> int:
        """Return a number that may be given once for each layer."""
        number = one_for_all(self.require(key))
        if number is None:
            raise CheckpointError(
                f'"{self.prefix}.{key}" differs between layers; SGLang serves one number in all of them'
            )
        return number

    def require_float(self, key: str) -> float:
        return shortest_float(self.require(key))


def shortest_float(value: float) -> float:
    """Return the decimal from which a 32-bit float was made: 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))


def model_config(file: GgufFile) -> dict[str, Any]:
    """Return the contents of config.json."""
    arch = architecture_of(file.metadata.get("general.architecture"))
    meta = _Metadata(file.metadata, arch.name)
    config = _common_config(file, arch, meta)
    extend = {"gemma2": _gemma2_config, "gemma3": _gemma3_config, "qwen2": _qwen_config, "qwen3": _qwen_config}
    config["rope_parameters"] = _rope_parameters(file, meta)
    if arch.name in extend:
        config |= extend[arch.name](meta, config)
    return config


def generation_config(file: GgufFile) -> dict[str, Any]:
    """Return the contents of generation_config.json: the ids that start and end a text or a turn."""
    metadata = file.metadata
    config: dict[str, Any] = {"eos_token_id": end_ids(metadata)}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token := special_id(metadata, key)) is not None:
            config[name] = token
    return config


def _common_config(file: GgufFile, arch: Architecture, meta: _Metadata) -> dict[str, Any]:
    heads = meta.require_one("attention.head_count")
    hidden = meta.require("embedding_length")
    kv_heads = heads if meta.get("attention.head_count_kv") is None else meta.require_one("attention.head_count_kv")
    tokens = file.tensors.get("token_embd.weight")
    if tokens is None:
        raise CheckpointError('tensor "token_embd.weight" is missing in the file; convert the model again')
    metadata = file.metadata
    return {
        "architectures": [arch.model_class],
        "model_type": arch.model_type,
        "vocab_size": tokens.shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.require_one("feed_forward_length"),
        "num_hidden_layers": meta.require("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": meta.get("attention.key_length", hidden // heads),
        "max_position_embeddings": meta.require("context_length"),
        "rms_norm_eps": meta.require_float("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "hidden_act": "silu",
        "bos_token_id": special_id(metadata, "bos"),
        "eos_token_id": special_id(metadata, "eos"),
        "dtype": "float16",
        "use_cache": True,
    }


def _qwen_config(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Qwen's converter writes no window: sliding-window attention is off in every published model."""
    return {"use_sliding_window": False, "attention_bias": config["attention_bias"] and meta.prefix == "qwen2"}


def _gemma_common(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    is_27b = config["num_hidden_layers"] == GEMMA_27B_LAYERS[meta.prefix]
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta.require("attention.sliding_window"),
    }


def _gemma2_config(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return _gemma_common(meta, config) | {
        "attn_logit_softcapping": meta.require_float("attn_logit_softcapping"),
        "final_logit_softcapping": meta.require_float("final_logit_softcapping"),
        "layer_types": [kinds[layer % 2] for layer in range(config["num_hidden_layers"])],
    }


def _gemma3_config(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    pattern = meta.require("attention.sliding_window_pattern")
    layers = range(config["num_hidden_layers"])
    full = [not slides for slides in pattern] if isinstance(pattern, list) else [(n + 1) % pattern == 0 for n in layers]
    cap = meta.get("final_logit_softcapping")
    return _gemma_common(meta, config) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None if cap is None else shortest_float(cap),
        "layer_types": ["full_attention" if is_full else "sliding_attention" for is_full in full],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": shortest_float(meta.get("rope.freq_base_swa", DEFAULT_BASE)),
            },
        },
    }


def _rope_parameters(file: GgufFile, meta: _Metadata) -> dict[str, Any]:
    """Return base and scaling of the rotary embedding, in transformers' terms."""
    theta = shortest_float(meta.get("rope.freq_base", DEFAULT_BASE))
    try:
        if ROPE_FACTORS in file.tensors:
            factors = file.rows(ROPE_FACTORS).view(np.float32).reshape(-1)
            return {"rope_theta": theta} | llama3_scaling(factors.tolist(), theta)
        return {"rope_theta": theta} | rope_scaling(file.metadata, meta.prefix)
    except RopeError as exc:
        raise CheckpointError(str(exc)) from exc
