"""SGLang's quantisation `bitsandbytes` (NF4, double quantisation), changed so that Pascal can run it.

SGLang has three faults here. It refuses the method below compute capability 7.0, though bitsandbytes has code
for 6.0, which 6.1 can run. It multiplies in bfloat16, which Pascal emulates; bitsandbytes multiplies in the type of its
input, so activations can stay as they are. And its loader names weights that it quantises itself `qweight`, while its
layers use `weight`, as quantised checkpoints do: "Parameter ... qweight not found in the model".
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.bitsandbytes import (
    BitsAndBytesConfig,
    BitsAndBytesLinearMethod,
    is_layer_skipped_bnb,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_pascal.ops.matmul import matmul_half, takes_half


class PascalNf4Config(BitsAndBytesConfig):  # type: ignore[misc]  # SGLang publishes no types
    """Gives linear layers a method that multiplies in the activations' type."""

    is_quantized_before = False
    """Whether the checkpoint already holds NF4; otherwise the loader makes it from 16-bit weights."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PascalNf4Config:
        """SGLang's constructor; config: the checkpoint's `quantization_config`, or one without a method."""
        made: PascalNf4Config = super().from_config(config)
        made.is_quantized_before = "quant_method" in config
        return made

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 60: compute capability 6.0 is the oldest for which bitsandbytes' CUDA 12.6 library has code."""
        return 60

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a linear layer; None for any other layer."""
        if not isinstance(layer, LinearBase):
            return None
        if is_layer_skipped_bnb(prefix, self.llm_int8_skip_modules):
            return UnquantizedLinearMethod()
        return PascalNf4LinearMethod(self)


class PascalNf4LinearMethod(BitsAndBytesLinearMethod):  # type: ignore[misc]
    """One layer whose weight SGLang's loader fills."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Register the parameter under the name that the loader fills; a byte holds two weights."""
        del params_dtype  # SGLang computes the weights per byte from its width, which is right only for 16 bits
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, torch.float16)
        super().create_weights(layer, *sizes, **attributes)
        if not self.quant_config.is_quantized_before:
            layer.qweight = layer.weight
            del layer.weight

    def _apply_4bit_weight(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x [..., in] times the weight [out, in], in x's type."""
        weight: Any = layer.weight if self.quant_config.is_quantized_before else layer.qweight
        rows, ends = x.reshape(-1, x.size(-1)), weight.bnb_shard_offsets.tolist()
        # SGLang's operator around this is registered only for its own CUDA platform.
        parts = [
            _multiply(rows, weight[ends[n] : ends[n + 1]], state) for n, state in sorted(weight.bnb_quant_state.items())
        ]
        result = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if bias is not None:
            result = result + bias
        return result.view(*x.shape[:-1], result.size(-1))


def _multiply(x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return x [n, in] times a packed matrix [out, in] of NF4.

    bitsandbytes has a kernel for one row; for more it expands the matrix and asks cuBLAS. Of a decode step's rows ours
    takes what it expands.
    """
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit

    if len(x) > 1 and x.is_cuda and takes_half(x):
        return matmul_half(x.contiguous(), dequantize_4bit(packed, state).half())
    result: torch.Tensor = matmul_4bit(x, packed.t(), state)
    return result
