"""Weights of linear layers on the CPU, kept in the layout in which oneDNN multiplies them.

`torch.nn.functional.linear` lays a bfloat16 matrix out anew for every product, which costs more than the product of a
few rows. Here it is laid out once, after loading; the original is freed, so that the memory stays the same.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

EXPECTED_ROWS: Final = 8
"""Of activations, for which oneDNN chooses the layout: those of a decode step. More rows are multiplied right too."""


class PackedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # SGLang publishes no types
    """Multiplies by one packed matrix; takes the place of the method that loaded its layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: bfloat16 `[outputs, inputs]`."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., inputs]` -> `[..., outputs]`."""
        del layer
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return result

    def apply_into(
        self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same into a tensor `[..., outputs]`."""
        return output.copy_(self.apply(layer, x, bias))


def pack_products(model: torch.nn.Module) -> int:
    """Pack the matrices of all linear layers that hold bfloat16, in place; how many those are.

    Nothing is packed where oneDNN has no bfloat16 products for this CPU, or for another type: float32 is as fast as it
    is in the file's order.
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
