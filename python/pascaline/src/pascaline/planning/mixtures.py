"""A model in another quantisation: the type of each tensor as llama-quantize chooses it, so that a plan needs no file.

The rules are those of llama.cpp's src/llama-quant.cpp (llama_tensor_get_type) for dense models and mixtures of experts,
without importance matrix; tests hold the resulting sizes against published files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pascaline.models.ggml_types import BLOCKS

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec, TensorSpec

PERPLEXITY_LOSS = {
    "F16": 0.0,
    "Q8_0": 0.0026,
    "Q6_K": 0.0217,
    "Q5_K_M": 0.0569,
    "Q4_K_M": 0.1754,
    "Q3_K_M": 0.6569,
    "Q3_K_S": 1.6321,
}
"""Mixtures that can be planned, best first, each with the perplexity that it adds to Llama 3 8B.

Documented in llama-quantize's own list of types. Smaller models lose more; the order is what matters here.
"""
MIXTURES = tuple(PERPLEXITY_LOSS)

_BASE = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K"}
# The type that replaces one whose blocks do not divide a row.
_FALLBACK = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_EMBEDDING = re.compile(r"^token_embd\.weight$|(^|\.)embed_tokens\.weight$")
_OUTPUT = re.compile(r"^output\.weight$|(^|\.)lm_head\.weight$")
_ATTENTION_V = re.compile(r"\.(attn_v|v_proj)\.weight$")
_ATTENTION_K = re.compile(r"\.(attn_k|k_proj)\.weight$")
_ATTENTION_OUTPUT = re.compile(r"\.(attn_output|o_proj)\.weight$")
_DOWN = re.compile(r"\.(ffn_down|ffn_down_exps|down_proj)\.weight$")
_KEPT = re.compile(r"ffn_gate_inp|ssm_conv1d|shortconv\.conv|pos_embd|token_types")
"""Matrices that are never quantised (llama-quant.cpp, tensor_allows_quantization)."""
_LAYER = re.compile(r"\.(\d+)\.")
_FEW_EXPERTS = 8
"""llama-quantize gives the attention of a mixture with exactly this number of experts more bits (llama-quant.cpp)."""


def requantized(spec: ModelSpec, mixture: str) -> ModelSpec:
    """Return the model as a GGUF file of this mixture would describe it."""
    tensors = tuple(_converted(tensor, spec, mixture) for tensor in spec.tensors if not _is_duplicate(tensor, spec))
    size = sum(tensor.n_bytes for tensor in tensors)
    return replace(spec, format="gguf", tensors=tensors, file_type=mixture, file_bytes=size)


def _is_duplicate(tensor: TensorSpec, spec: ModelSpec) -> bool:
    return spec.tied_embeddings and bool(_OUTPUT.search(tensor.name))


def _converted(tensor: TensorSpec, spec: ModelSpec, mixture: str) -> TensorSpec:
    kind = "F32" if len(tensor.shape) < 2 or _KEPT.search(tensor.name) else _matrix_type(tensor.name, spec, mixture)
    columns = tensor.shape[-1] if tensor.shape else 1
    if columns % BLOCKS[kind][0]:
        kind = _FALLBACK.get(kind, "F16")
    if columns % BLOCKS[kind][0]:
        kind = "F16"
    elements, n_bytes = BLOCKS[kind]
    return replace(tensor, tensor_type=kind, n_bytes=tensor.n_elements // elements * n_bytes)


def _matrix_type(name: str, spec: ModelSpec, mixture: str) -> str:
    base = _BASE.get(mixture)
    if (
        spec.num_experts == _FEW_EXPERTS
        and mixture != "F16"
        and (_ATTENTION_K.search(name) or _ATTENTION_V.search(name))
    ):
        return "Q8_0"
    if base is None:
        return mixture
    if spec.num_experts == _FEW_EXPERTS and mixture != "Q5_K_M" and _ATTENTION_OUTPUT.search(name):
        return "Q5_K"
    if _OUTPUT.search(name) or (spec.tied_embeddings and _EMBEDDING.search(name)):
        return "Q6_K"
    match = _LAYER.search(name)
    layer, layers = int(match.group(1)) if match else 0, spec.num_hidden_layers
    if mixture == "Q3_K_M":
        return _q3_k_m_type(name, layer, layers) or base
    is_precise = mixture in ("Q4_K_M", "Q5_K_M") and (_ATTENTION_V.search(name) or _DOWN.search(name))
    return "Q6_K" if is_precise and _gets_more_bits(layer, layers) else base


def _q3_k_m_type(name: str, layer: int, layers: int) -> str | None:
    """Return the type of a matrix that Q3_K_M makes more precise than its base; None for any other."""
    if _ATTENTION_V.search(name):
        return "Q5_K" if layer < 2 else "Q4_K"
    if _DOWN.search(name):
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return "Q4_K" if _ATTENTION_OUTPUT.search(name) else None


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between (llama-quant.cpp, use_more_bits)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
