"""Headers of sound GGUF models as plain data, and what an engine gets of them: for tests that damage them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf_acceptance import Header, Tensor, Verdict
from gguf_acceptance.dimensions import ROPE_FREQS, TIED, read_dimensions, wanted_tensors
from gguf_acceptance.rope import llama3_factors
from sglang_pascal.checkpoint.config import generation_config, model_config
from sglang_pascal.checkpoint.tokenizer import tokenizer_config

SIZES = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
TOKENS = ["<s>", "</s>", "a", "b", "ab", "c", "abc", "<|im_end|>"]
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
}
WINDOW = {"attention.sliding_window": 128, "final_logit_softcapping": 30.0}
FURTHER = {
    "gemma2": WINDOW | {"attn_logit_softcapping": 50.0},
    "gemma3": WINDOW | {"rope.freq_base_swa": 10000.0, "attention.sliding_window_pattern": 6},
}


def whole(architecture: str = "llama") -> tuple[dict, dict]:
    """Metadata and tensors of a sound model."""
    sizes = SIZES | FURTHER.get(architecture, {})
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
    }
    metadata |= VOCABULARY
    dimensions = read_dimensions(Header(metadata, {}), architecture, Verdict())
    assert dimensions is not None
    tensors = {
        each.name: Tensor("F32" if len(each.shape) == 1 else "Q8_0", each.shape)
        for each in wanted_tensors(architecture, dimensions, biased=False)
        if each.name != "rope_freqs.weight"
    }
    return metadata, tensors


SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": True,
}
SCALINGS = (
    {},
    {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    {"rope.scale_linear": 2.0},
    {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 0.5,
        "rope.scaling.yarn_beta_fast": 64.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    },
)
MAY_BE_ABSENT = frozenset(
    {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eot", "eom", "unknown", "padding")}
    | {"tokenizer.ggml.eos_token_ids", "gemma3.final_logit_softcapping", ROPE_FREQS}
)
"""Most sound files lack these, and their absence says that there is no such token, no cap, no scaling."""


@dataclass
class Fake:
    """What the conversion reads of a file."""

    metadata: dict
    tensors: dict

    def rows(self, name: str) -> np.ndarray:
        assert name == ROPE_FREQS
        return np.array(llama3_factors(32, 10000.0, 8.0), np.float32).view(np.uint8).reshape(1, -1)


def seeds() -> list[tuple[dict, dict]]:
    """Sound headers of every architecture, vocabulary and scaling."""
    found = []
    for architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3"):
        for number, scaling in enumerate(SCALINGS if architecture != "gemma2" else SCALINGS[:1]):
            sizes = SIZES | FURTHER.get(architecture, {}) | scaling
            metadata = {"general.architecture": architecture}
            metadata |= {f"{architecture}.{key}": value for key, value in sizes.items()}
            metadata |= VOCABULARY | (SENTENCEPIECE if number % 2 else {"tokenizer.ggml.eot_token_id": 7})
            if number % 2:
                del metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.merges"]
            metadata |= {"tokenizer.chat_template": "{{ messages }}", "general.name": "seed"}
            found.append((metadata, tensors_of(metadata, architecture, biased=architecture == "llama" and number == 2)))
    return found


def tensors_of(metadata: dict, architecture: str, *, biased: bool) -> dict:
    dimensions = read_dimensions(Header(metadata, {}), architecture, Verdict())
    assert dimensions is not None
    has_scaling = any("rope.scal" in key for key in metadata)
    return {
        each.name: Tensor("F32" if len(each.shape) == 1 else "Q8_0", each.shape)
        for each in wanted_tensors(architecture, dimensions, biased=biased)
        if (each.name != ROPE_FREQS or not has_scaling) and (each.name != "output.weight" or architecture not in TIED)
    }


def served(metadata: dict, tensors: dict) -> list:
    """Everything that the engine gets."""
    file = Fake(metadata, tensors)
    tokenizer = {
        key: metadata.get(f"tokenizer.ggml.{key}")
        for key in ("model", "pre", "tokens", "token_type", "scores", "merges", "add_space_prefix")
    }
    if metadata.get("tokenizer.ggml.model") == "llama":
        tokenizer.pop("pre")  # SentencePiece splits nothing before it merges
    config, generation = model_config(file), generation_config(file)  # type: ignore[arg-type]
    return [config, generation, tokenizer_config(metadata), tokenizer, {**tensors}]


def is_another_value(before: object, after: object) -> bool:
    """Whether it is of the same kind: no one but its maker can know that a file says another number."""
    kinds = (bool, int | float, str, list)
    return any(isinstance(before, kind) and isinstance(after, kind) for kind in kinds) and before != after
