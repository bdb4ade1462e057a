"""Makes Hugging Face folders (config.json, model.safetensors) of small models with random weights, without torch.

write_folder(path, tiny("qwen3"))        the shapes are those of support.models, of the same five architectures
"""

from __future__ import annotations

import json
import math
import struct
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from support.models import Shape

REPEATED = 1 << 22
"""Weights of a large tensor that are random, and repeat: a model of a gigabyte is written in a second or two."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def write_folder(folder: Path, shape: Shape, *, dtype: str = "float16", seed: int = 0) -> Path:
    """Write config.json and model.safetensors (float16 or float32) into the folder, and return it."""
    return write_files(folder, config(shape, dtype), tensor_shapes(shape), dtype=dtype, seed=seed)


def write_mixture_of_experts(folder: Path, shape: Shape, *, experts: int, used: int, expert_size: int) -> Path:
    """Write a Qwen 3 mixture of experts: the attention of `shape` (of qwen3), `experts` small MLPs in each layer."""
    values = config(shape) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": expert_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        layer, _, part = name.partition(".mlp.")
        if not part:
            tensors[name] = size
            continue
        tensors[f"{layer}.mlp.gate.weight"] = (experts, shape.hidden_size)
        for expert in range(experts):
            rows_or_columns = (expert_size if count == shape.intermediate_size else count for count in size)
            tensors[f"{layer}.mlp.experts.{expert}.{part}"] = tuple(rows_or_columns)
    return write_files(folder, values, tensors)


def write_files(
    folder: Path,
    values: dict[str, object],
    tensors: dict[str, tuple[int, ...]],
    *,
    dtype: str = "float16",
    seed: int = 0,
) -> Path:
    """Write a config.json of these values and random weights of these shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    name, width = {"float16": ("F16", 2), "float32": ("F32", 4)}[dtype]
    header, offset = {}, 0
    for tensor, size in tensors.items():
        end = offset + math.prod(size) * width
        header[tensor] = {"dtype": name, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        large = np.empty(0, dtype)
        for size in tensors.values():
            scale = 1.0 if len(size) == 1 else 0.02
            n_elements = math.prod(size)
            if n_elements < REPEATED:
                file.write((random.standard_normal(n_elements, dtype=np.float32) * scale).astype(dtype).tobytes())
                continue
            if not large.size:
                large = (random.standard_normal(REPEATED, dtype=np.float32) * scale).astype(dtype)
            # Another start each time: no two matrices are the same.
            start = int(random.integers(REPEATED))
            _write_cycle(file, np.concatenate([large[start:], large[:start]]), n_elements)
    return folder


def _write_cycle(file: IO[bytes], values: np.ndarray, n_elements: int) -> None:
    """Write this number of elements; after the last value comes the first again."""
    for _ in range(n_elements // values.size):
        file.write(values.data)
    file.write(values[: n_elements % values.size].data)


def config(shape: Shape, dtype: str = "float16") -> dict[str, object]:
    """The config.json of a shape."""
    gemma = shape.architecture.startswith("gemma")
    values: dict[str, object] = {
        "architectures": [_CLASSES[shape.architecture]],
        "model_type": "gemma3_text" if shape.architecture == "gemma3" else shape.architecture,
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
    }
    if gemma:
        values |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": shape.sliding_window}
        values |= {"query_pre_attn_scalar": shape.head_dim}
    return values


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """All tensors of a model, rows first, by transformers' names."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_hidden_layers):
        found |= {f"model.layers.{layer}.{name}": size for name, size in _layer_shapes(shape).items()}
    found["model.norm.weight"] = (shape.hidden_size,)
    if not shape.tied_embeddings:
        found["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    return found


def _layer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if shape.architecture == "qwen2":
        found |= {"self_attn.q_proj.bias": (heads,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if shape.architecture in ("qwen3", "gemma3"):
        found |= {"self_attn.q_norm.weight": (shape.head_dim,), "self_attn.k_norm.weight": (shape.head_dim,)}
    if shape.architecture in ("gemma2", "gemma3"):
        found |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    return found
