"""Tiny models with random weights as GGUF files, of which every key and every tensor can be changed."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from support.differential.vocabularies import Keys, byte_level
from support.models import BLOCK_SCALES, add_value, random_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPREAD: Final = 1.2
"""Standard deviation of a matrix times the root of its width: attention is neither uniform nor a single token's."""
ABSENT: Final = None
"""As the value of a key or the shape of a tensor: leave it out."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One model. Sizes as in Hugging Face's config.json."""

    architecture: str = "llama"
    layers: int = 2
    hidden: int = 64
    feed: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    tied: bool = False
    biases: tuple[str, ...] = ()
    """Names of layer tensors with a bias, such as `attn_q`."""
    vocabulary: Keys = field(default_factory=lambda: byte_level("gpt-2"))
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the keys: those that start with a dot are the architecture's; ABSENT removes one."""
    tensors: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the tensors: a shape for random numbers, an array, or ABSENT."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Pattern of names -> tensor type, the first that matches; F32 for all others, and for vectors."""
    seed: int = 0


def metadata(model: Tiny) -> dict[str, Any]:
    """Every key of the file, whole names."""
    values: dict[str, Any] = {
        ".block_count": model.layers,
        ".context_length": 512,
        ".embedding_length": model.hidden,
        ".feed_forward_length": model.feed,
        ".attention.head_count": model.heads,
        ".attention.head_count_kv": model.kv_heads,
        ".attention.key_length": model.head_dim,
        ".attention.value_length": model.head_dim,
        ".attention.layer_norm_rms_epsilon": 1e-5,
        ".rope.freq_base": 10000.0,
    }
    if model.architecture == "llama":
        values[".rope.dimension_count"] = model.head_dim
    if model.architecture.startswith("gemma"):
        values[".attention.sliding_window"] = 8
    if model.architecture == "gemma2":
        values |= {".attn_logit_softcapping": 5.0, ".final_logit_softcapping": 3.0}
    values |= {f"tokenizer.ggml.{key}": value for key, value in model.vocabulary.items()}
    named = {
        f"{model.architecture}{key}" if key.startswith(".") else key: value
        for key, value in (values | dict(model.keys)).items()
    }
    return {key: value for key, value in named.items() if value is not ABSENT}


def shapes(model: Tiny) -> dict[str, Any]:
    """Every tensor: its shape, outermost dimension first, or its values."""
    rows = len(model.vocabulary["tokens"])
    found: dict[str, Any] = {"token_embd.weight": (rows, model.hidden)}
    for layer in range(model.layers):
        found |= {f"blk.{layer}.{name}": shape for name, shape in _layer(model).items()}
    found["output_norm.weight"] = (model.hidden,)
    if not model.tied:
        found["output.weight"] = (rows, model.hidden)
    return {name: shape for name, shape in (found | dict(model.tensors)).items() if shape is not ABSENT}


def _layer(model: Tiny) -> dict[str, tuple[int, ...]]:
    hidden, query, key = (
        model.hidden,
        model.heads * model.head_dim,
        model.kv_heads * model.head_dim,
    )
    matrices = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (model.feed, hidden),
        "ffn_up": (model.feed, hidden),
        "ffn_down": (hidden, model.feed),
    }
    norms = {"attn_norm": hidden, "ffn_norm": hidden}
    if model.architecture in ("qwen3", "gemma3"):
        norms |= {"attn_q_norm": model.head_dim, "attn_k_norm": model.head_dim}
    if model.architecture.startswith("gemma"):
        norms |= {"post_attention_norm": hidden, "post_ffw_norm": hidden}
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    found |= {f"{name}.weight": (width,) for name, width in norms.items()}
    return found | {f"{name}.bias": (matrices[name][0],) for name in model.biases}


def write(path: Path, model: Tiny) -> Path:
    """Write the file and return its path."""
    random = np.random.default_rng(model.seed)
    writer = GGUFWriter(path, model.architecture)
    for key, value in metadata(model).items():
        add_value(writer, key, value)
    for name, shape in shapes(model).items():
        values = shape if isinstance(shape, np.ndarray) else weights(random, name, shape)
        _add_tensor(writer, name, values, _type(model, name, values), random)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers: norms around 1, biases around 0, matrices that keep the size of what they multiply."""
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    return values * np.float32(0.5 if len(shape) == 1 else SPREAD / math.sqrt(shape[-1]))


def _type(model: Tiny, name: str, values: np.ndarray) -> str:
    if values.ndim == 1:
        return "F32"
    return next(
        (kind for pattern, kind in model.types.items() if fnmatch.fnmatch(name, pattern)),
        "F32",
    )


def _add_tensor(
    writer: GGUFWriter,
    name: str,
    values: np.ndarray,
    kind: str,
    random: np.random.Generator,
) -> None:
    number = GGMLQuantizationType[kind]
    if kind in BLOCK_SCALES:
        writer.add_tensor(name, _random_blocks(random, values, kind), raw_dtype=number)
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), number), raw_dtype=number)


def _random_blocks(random: np.random.Generator, values: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of a type that gguf-py decodes but does not encode, as large as the values."""
    rows = random_tensor(random, values.shape, kind)
    scale = values.std() / gguf.dequantize(rows, GGMLQuantizationType[kind]).std()
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    for at in BLOCK_SCALES[kind]:
        blocks[:, at : at + 2] = (
            (blocks[:, at : at + 2].copy().view(np.float16) * scale).astype(np.float16).view(np.uint8)
        )
    return blocks.reshape(rows.shape)
