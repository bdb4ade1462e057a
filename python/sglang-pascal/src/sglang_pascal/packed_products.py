"""Weights of linear layers on the CPU, kept in the layout in which oneDNN multiplies them.

`torch.nn.functional.linear` converts a bfloat16 matrix for every product, which costs more than the product of a few
rows. Here it is converted once, after loading; the original is freed, so the memory use stays the same.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

EXPECTED_ROWS: Final = 8
"""Rows of activations for which oneDNN chooses the layout: a decode step's. More rows are multiplied correctly too."""


class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # SGLang publishes no types
    """Multiplies by one packed matrix; replaces the method that loaded its layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: bfloat16 `[outputs, inputs]`."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[..., inputs]` to `[..., outputs]`."""
        del layer
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return result

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply into a tensor `[..., outputs]`."""
        return output.copy_(self.apply(layer, x, bias))


def pack_products(model: torch.nn.Module) -> int:
    """Pack the bfloat16 matrices of all linear layers in place; return their number.

    Nothing is packed if oneDNN has no bfloat16 products for this CPU, or for another type: float32 is as fast in the
    file's order.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers: list[Any] = [module for module in model.modules() if _can_be_packed(module)]
    for layer in layers:
        layer.quant_method = PackedLinearMethod(layer.weight.data)
        layer.weight.data = layer.weight.data.new_empty(0)
    return len(layers)


def _can_be_packed(module: Any) -> bool:
    return (
        isinstance(module, LinearBase)
        and type(module.quant_method) is UnquantizedLinearMethod
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.dim() == 2
    )
