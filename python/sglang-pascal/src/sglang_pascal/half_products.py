"""float16 weights that nobody quantised, multiplied in decode steps by our kernel in place of cuBLAS.

cuBLAS chooses its kernel, and with it the order of its sums, by the number of rows: an answer then depends on how many
others are decoded beside it, and what is recorded in a step is not known before a card runs it. Our kernel reads the
weight once for all rows and sums each row alike. Prompts have more rows than it takes; they stay with cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_pascal.ops.matmul import matmul_half, takes_half


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return x `[..., columns]` x weight `[rows, columns]` as `[..., rows]`; None if our kernel does not take them.

    bias `[rows]` is added in float32, whatever its type.
    """
    flat = x.reshape(-1, x.shape[-1])
    if weight.dtype != torch.float16 or not takes_half(flat):
        return None
    result = matmul_half(flat.contiguous(), weight, bias=None if bias is None else bias.float())
    return result.view(*x.shape[:-1], result.shape[-1])


class HalfLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # SGLang publishes no types
    """Of a linear layer."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[..., inputs]` to `[..., outputs]`."""
        ours = product(x, layer.weight, bias)
        return super().apply(layer, x, bias) if ours is None else ours

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply into a tensor `[..., outputs]`."""
        return output.copy_(self.apply(layer, x, bias))


class HalfEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """Of the output matrix. SGLang asks a method of another name than its own for the logits."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[n, hidden]` to `[n, vocabulary]`."""
        ours = product(x, layer.weight, bias)
        return super().apply(layer, x, bias) if ours is None else ours


def use_half_products(model: torch.nn.Module, device: str = "cuda") -> int:
    """Give every layer of a model whose float16 weight is on the device our method, in place; return their number."""
    count = 0
    for module in model.modules():
        weight, method = getattr(module, "weight", None), type(getattr(module, "quant_method", None))
        if weight is None or weight.dtype != torch.float16 or weight.dim() != 2 or weight.device.type != device:
            continue
        layer: Any = module
        if isinstance(module, LinearBase) and method is UnquantizedLinearMethod:
            layer.quant_method = HalfLinearMethod()
        elif isinstance(module, VocabParallelEmbedding) and method is UnquantizedEmbeddingMethod:
            layer.quant_method = HalfEmbeddingMethod()
        else:
            continue
        count += 1
    return count
