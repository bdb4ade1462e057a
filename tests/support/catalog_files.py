"""Sparse GGUF files of catalogue shapes with few layers, complete enough for llama-server to load.

The catalogue leaves out vectors and biases, which no plan needs; a server refuses a file without them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from pascaline.planning.catalog import catalog_spec, shapes
from support.models import SHAPES, add_tokenizer, add_value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_Sizes = dict[str, tuple[int, ...]]


def shape_named(name: str, layers: int) -> dict[str, Any]:
    """Return a shape of the catalogue, reduced to the given number of layers."""
    known = next(shape for shape in shapes() if shape["name"] == name)
    return {**known, "layers": layers}


def write_catalog_file(path: Path, shape: Mapping[str, Any]) -> Path:
    """Write a file whose weights are holes, and return its path."""
    spec = catalog_spec(shape)
    writer = GGUFWriter(path, shape["architecture"])
    for key, value in _metadata(shape).items():
        add_value(writer, key if key.startswith("general") else f"{shape['architecture']}.{key}", value)
    add_tokenizer(writer, replace(SHAPES["qwen3-4b"], vocab_size=shape["vocab"], merges=1))
    total = 0
    tensors = {
        tensor.name: (tensor.shape, tensor.tensor_type) for tensor in spec.tensors if _is_kept(tensor.name, shape)
    }
    tensors |= {name: (size, "F32") for name, size in _vectors(shape).items()}
    for name, (size, kind_name) in tensors.items():
        kind = GGMLQuantizationType[kind_name]
        row = size if kind_name == "F32" else gguf.quant_shape_to_byte_shape(size, kind)
        n_bytes = math.prod(row) * (4 if kind_name == "F32" else 1)
        dtype = np.dtype(np.float32 if kind_name == "F32" else np.uint8)
        writer.add_tensor_info(name, row, dtype, n_bytes, raw_dtype=kind)
        total += gguf.GGUFWriter.ggml_pad(n_bytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.fout[0].truncate(writer.fout[0].tell() + total)
    writer.close()
    return path


def _is_kept(name: str, shape: Mapping[str, Any]) -> bool:
    """Some call the norm before the MLP otherwise."""
    others = ("gpt-oss", "glm4moe", "qwen35", "qwen35moe")
    return not (name.endswith("ffn_norm.weight") and shape["architecture"] in others)


def _metadata(shape: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "general.name": shape["name"],
        "general.file_type": 15,
        "block_count": shape["layers"],
        "context_length": shape["context"],
        "embedding_length": shape["hidden"],
        "feed_forward_length": shape.get("ffn", shape.get("expert_width", 0)),
        "attention.head_count": shape["heads"],
        "attention.head_count_kv": shape.get("kv_heads", shape["heads"]),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if "head_dim" in shape:
        found |= {"attention.key_length": shape["head_dim"], "attention.value_length": shape["head_dim"]}
    if "experts" in shape:
        found |= {"expert_count": shape["experts"], "expert_used_count": shape["experts_used"]}
        found["expert_feed_forward_length"] = shape["expert_width"]
    if "dense_layers" in shape:
        found |= {"leading_dense_block_count": shape["dense_layers"], "expert_weights_scale": 1.0}
        found |= {"expert_shared_count": shape["shared_expert_width"] // shape["expert_width"]}
        found |= {"expert_weights_norm": True, "expert_gating_func": 2 if shape["architecture"] == "glm4moe" else 1}
    if "sliding_window" in shape:
        found["attention.sliding_window"] = shape["sliding_window"]
    if "delta_head_dim" in shape:
        dim = shape["delta_head_dim"]
        found |= {
            "full_attention_interval": shape["attention_every"],
            "ssm.conv_kernel": shape["conv_kernel"],
            "ssm.state_size": dim,
            "ssm.group_count": shape["delta_key_heads"],
            "ssm.time_step_rank": shape["delta_value_heads"],
            "ssm.inner_size": shape["delta_value_heads"] * dim,
            "rope.dimension_count": 64,
            "rope.dimension_sections": [11, 11, 10, 0],
        }
        if "shared_expert_width" in shape:
            found["expert_shared_feed_forward_length"] = shape["shared_expert_width"]
    if rank := shape.get("kv_lora_rank"):
        rope = shape["qk_rope_head_dim"]
        found |= {
            "attention.head_count_kv": 1,
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + rope,
            "attention.value_length": rank,
            "attention.key_length_mla": shape["qk_nope_head_dim"] + rope,
            "attention.value_length_mla": shape["v_head_dim"],
            "rope.dimension_count": rope,
        }
        found["vocab_size"] = shape["vocab"]
    return found


def _vectors(shape: Mapping[str, Any]) -> _Sizes:
    """The vectors of each layer that the catalogue leaves out."""
    kind, heads, kv_heads = shape["architecture"], shape["heads"], shape.get("kv_heads", shape["heads"])
    hidden, dim = shape["hidden"], shape.get("head_dim", 0)
    biases: _Sizes = {"attn_q.bias": (heads * dim,), "attn_k.bias": (kv_heads * dim,), "attn_v.bias": (kv_heads * dim,)}
    of_each: _Sizes = {}
    if kind in ("qwen3", "qwen3moe"):
        of_each = {"attn_q_norm.weight": (dim,), "attn_k_norm.weight": (dim,)}
    elif kind == "deepseek2":
        of_each = {"attn_kv_a_norm.weight": (shape["kv_lora_rank"],)}
    elif kind == "glm4moe":
        of_each = {**biases, "post_attention_norm.weight": (hidden,)}
    elif kind == "gpt-oss":
        experts, width = shape["experts"], shape["expert_width"]
        of_each = {
            **biases,
            "attn_output.bias": (hidden,),
            "attn_sinks.weight": (heads,),
            "post_attention_norm.weight": (hidden,),
            "ffn_gate_inp.bias": (experts,),
            "ffn_gate_exps.bias": (experts, width),
            "ffn_up_exps.bias": (experts, width),
            "ffn_down_exps.bias": (experts, hidden),
        }
    found = {f"blk.{layer}.{name}": size for layer in range(shape["layers"]) for name, size in of_each.items()}
    if "delta_head_dim" in shape:
        for layer in range(shape["layers"]):
            is_delta = (layer + 1) % shape["attention_every"] != 0
            found |= {f"blk.{layer}.{name}": size for name, size in _delta_vectors(shape, is_delta=is_delta).items()}
    if kind == "glm4moe":
        layers = range(shape["dense_layers"], shape["layers"])
        found |= {f"blk.{layer}.exp_probs_b.bias": (shape["experts"],) for layer in layers}
    return found


def _delta_vectors(shape: Mapping[str, Any], *, is_delta: bool) -> _Sizes:
    """Those of a layer of the delta-net family."""
    found: _Sizes = {"post_attention_norm.weight": (shape["hidden"],)}
    if "shared_expert_width" in shape:
        found["ffn_gate_inp_shexp.weight"] = (shape["hidden"],)
    if not is_delta:
        return found | {"attn_q_norm.weight": (shape["head_dim"],), "attn_k_norm.weight": (shape["head_dim"],)}
    heads = shape["delta_value_heads"]
    return found | {"ssm_a": (heads,), "ssm_dt.bias": (heads,), "ssm_norm.weight": (shape["delta_head_dim"],)}
