"""Gives the file's matrices to the layers of a model, by name, before weights are loaded.

SGLang's Gemma models make their token embedding without a quantisation method; they get one here. In float16, Gemma 2's
embedding would need 1.2 GB, a sixth of a small card; the file holds it in less than half of that.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_pascal.quantization.method import QuantizedEmbeddingMethod, QuantizedLinearMethod
from sglang_pascal.quantization.staging import Stager

if TYPE_CHECKING:
    from sglang_pascal.quantization.weight_table import MatrixInfo, WeightTable


def bind(model: torch.nn.Module, table: WeightTable) -> list[MatrixInfo]:
    """Allocate memory for every matrix that a layer will hold quantised; return these matrices."""
    held: list[MatrixInfo] = []
    stager: Stager | None = None
    for name, module in model.named_modules():
        is_embedding = isinstance(module, VocabParallelEmbedding | torch.nn.Embedding)
        method = getattr(module, "quant_method", None)
        if is_embedding and name in table and not isinstance(method, QuantizedLinearMethod):
            method = _quantize_embedding(module)
        if isinstance(method, QuantizedLinearMethod):
            # One stager for all: with one per layer, 4 GB of an 8B model stayed pinned in the host's memory.
            stager = stager or Stager(method.device)
            method.bind(module, table.parts_of(name), stager)
            held += method.parts
    return held


def _quantize_embedding(module: torch.nn.Module) -> QuantizedEmbeddingMethod:
    """Remove the float rows of an embedding that has some, and make it use a method of ours."""
    old, method = module.weight, QuantizedEmbeddingMethod()
    assert isinstance(old, torch.nn.Parameter)
    (rows, columns), dtype, device = old.shape, old.dtype, old.device
    del module.weight, old
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the float rows must not stay in memory beside the quantised ones
    with device:
        method.create_weights(module, columns, [rows], columns, rows, params_dtype=dtype)
    module.quant_method = method
    if isinstance(module, torch.nn.Embedding):
        module.forward = functools.partial(_look_up, module, method)  # type: ignore[method-assign]
    return method


def _look_up(module: torch.nn.Embedding, method: QuantizedEmbeddingMethod, ids: torch.Tensor) -> torch.Tensor:
    """Replace `forward` of an `nn.Embedding`; multiply by Gemma 3's factor if the class has one."""
    rows = method.embedding(module, ids.flatten()).view(*ids.shape, -1)
    scale = getattr(module, "embed_scale", None)
    return rows if scale is None else rows * scale
