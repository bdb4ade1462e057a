"""Activations as int8 with one scale per 32 values, fused with the operation before a product.

Inputs are float16 or float32, contiguous, one row per token. Each row's result is independent of the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_pascal.kernels.arguments import Quantize, RmsNormQuantize
from sglang_pascal.kernels.formats import BLOCK, TILE_COLUMNS, tiles
from sglang_pascal.ops._call import FLOATS, address, is_half, launch, require
from sglang_pascal.reference import quantize_ref, rms_norm_ref, silu_mul_ref

_THREADS = 128
_VALUES = 4
"""Values per thread of `quantize` and `silu_mul_quantize`."""
_MOST_NORM_THREADS = 1024


class Activations(NamedTuple):
    """`n` rows of quantised activations; x = d * q. K is the number of columns, padded with zeros to 256.

    With 16 bits there are 2n rows: row n + i holds the rounding error of row i in steps 256 times as fine, and its
    scales are those of the whole value: x = d * (256 * high + low).
    """

    q: torch.Tensor
    """int8 `[n, K]`."""
    scales: torch.Tensor
    """float32 `[n, K / 32, 2]` of (d, d * sum q)."""


def empty_activations(n: int, columns: int, device: torch.device) -> Activations:
    """Return uninitialised memory for n rows."""
    padded = tiles(columns) * TILE_COLUMNS
    return Activations(
        torch.empty(n, padded, dtype=torch.int8, device=device),
        torch.empty(n, padded // BLOCK, 2, dtype=torch.float32, device=device),
    )


def quantize(x: torch.Tensor, *, is_16_bit: bool = False) -> Activations:
    """Quantise x `[n, columns]`: d = largest magnitude / 127, q = round(x / d). A NaN or infinity is visible in d."""
    require("x", x, FLOATS, (None, None), x)
    if not x.is_cuda:
        return Activations(*quantize_ref(x, is_16_bit=is_16_bit))
    return _quantize("quantize", x, x.shape[1], is_16_bit)


def silu_mul_quantize(gate_up: torch.Tensor, *, is_16_bit: bool = False) -> Activations:
    """Quantise silu(gate) * up. gate_up `[n, 2 * columns]`, gate first."""
    require("gate_up", gate_up, FLOATS, (None, None), gate_up)
    if not gate_up.is_cuda:
        return Activations(*quantize_ref(silu_mul_ref(gate_up), is_16_bit=is_16_bit))
    return _quantize("silu_mul_quantize", gate_up, gate_up.shape[1] // 2, is_16_bit)


def _quantize(function: str, x: torch.Tensor, columns: int, is_16_bit: bool) -> Activations:
    result = empty_activations((1 + is_16_bit) * x.shape[0], columns, x.device)
    padded = result.q.shape[1]
    if x.shape[0]:
        launch(
            "quantize",
            function,
            _THREADS,
            (-(-padded // (_THREADS * _VALUES)), x.shape[0], 1),
            Quantize(
                x=x.data_ptr(),
                q=result.q.data_ptr(),
                scales=result.scales.data_ptr(),
                x_is_half=is_half(x),
                columns=columns,
                K=padded,
                low=x.shape[0] if is_16_bit else 0,
            ),
            x,
            f"x {list(x.shape)}",
        )
    return result


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return x / rms(x) * weight, like x. residual is first added to x and **replaced by the sum** (SGLang's rule)."""
    output = torch.empty_like(x)
    _rms_norm(x, weight, eps, residual, output, None)
    return output


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    is_16_bit: bool = False,
    output: torch.Tensor | None = None,
) -> Activations:
    """Do `rms_norm` and quantise in the same launch, before the result is rounded to x's type.

    output: like x; receives the floats too.
    """
    result = empty_activations((1 + is_16_bit) * x.shape[0], x.shape[1], x.device)
    _rms_norm(x, weight, eps, residual, output, result)
    return result


def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    result: Activations | None,
) -> None:
    n, columns = x.shape
    require("x", x, FLOATS, (None, None), x)
    require("weight", weight, FLOATS, (columns,), x)
    for name, like_x in (("residual", residual), ("output", output)):
        if like_x is not None:
            require(name, like_x, (x.dtype,), (n, columns), x)
    if not x.is_cuda:
        _rms_norm_on_cpu(x, weight, eps, residual, output, result)
    elif n:
        padded = tiles(columns) * TILE_COLUMNS
        launch(
            "quantize",
            "rms_norm_quantize",
            min(padded, _MOST_NORM_THREADS),
            (n, 1, 1),
            RmsNormQuantize(
                x=x.data_ptr(),
                residual=address(residual),
                weight=weight.data_ptr(),
                y=address(output),
                q=address(result and result.q),
                scales=address(result and result.scales),
                eps=eps,
                x_is_half=is_half(x),
                weight_is_half=is_half(weight),
                columns=columns,
                K=padded,
                low=n if result is not None and len(result.q) > n else 0,
            ),
            x,
            f"x {list(x.shape)}",
        )


def _rms_norm_on_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    result: Activations | None,
) -> None:
    if residual is not None:
        x = residual.copy_(x.float() + residual.float())
    normed = rms_norm_ref(x, weight, eps)
    if output is not None:
        output.copy_(normed)
    if result is not None:
        for part, value in zip(result, quantize_ref(normed, is_16_bit=len(result.q) > len(x)), strict=True):
            part.copy_(value)
