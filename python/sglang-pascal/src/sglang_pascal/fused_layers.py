"""Runs layers of SGLang's models in few launches. One launch norms and rotates queries and keys and writes keys and
values; the norm before a product, the activation function and attention each quantise their result.

`fuse` wraps a layer's own `forward`. The fused code runs only if attention runs on our kernels and they can compute the
layer; otherwise SGLang's own code runs. One device only: no reduction over ranks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend

from sglang_pascal.attention.kernels_backend import KernelAttentionBackend, Rotation
from sglang_pascal.ops.activations import Activations, rms_norm, rms_norm_quantize, silu_mul_quantize
from sglang_pascal.quantization.handover import hand_over_activations
from sglang_pascal.quantization.method import QuantizedLinearMethod
from sglang_pascal.quantization.precision import activations_are_16_bit

if TYPE_CHECKING:
    from collections.abc import Callable

_FLOATS: Final = (torch.float16, torch.float32)
"""Types that the kernels read."""


def attention_layer(
    original: Callable[..., torch.Tensor],
    self: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
) -> torch.Tensor:
    """The attention of Llama, Qwen 2 and Qwen 3: projection, attention, projection."""
    backend, rotary = get_attn_backend(), self.rotary_emb
    if not isinstance(backend, KernelAttentionBackend) or not _rotates_as_the_kernel(rotary, hidden_states):
        return original(positions, hidden_states, forward_batch)
    qkv, _ = self.qkv_proj(hidden_states)
    rotation = Rotation(positions, rotary.cos_sin_cache, rotary.is_neox_style, *_norms(self))
    method = self.o_proj.quant_method
    is_16_bit = activations_are_16_bit()
    attended = backend.forward_fused(
        qkv, rotation, self.attn, quantized=backend.is_decode and takes_quantized(method), is_16_bit=is_16_bit
    )
    if isinstance(attended, Activations):
        projected: torch.Tensor = method.apply_quantized(attended, qkv.dtype, self.o_proj.bias, is_16_bit=is_16_bit)
        return projected
    output: torch.Tensor = self.o_proj(attended)[0]
    return output


def mlp_layer(
    original: Callable[..., torch.Tensor], self: Any, x: torch.Tensor, *more: Any, **named: Any
) -> torch.Tensor:
    """The gated MLP of Llama and Qwen 2: both projections, with silu(gate) * up between them."""
    method = self.down_proj.quant_method
    if not (
        isinstance(get_attn_backend(), KernelAttentionBackend)
        and x.dtype in _FLOATS
        and type(self.act_fn) is SiluAndMul
        and takes_quantized(method)
    ):
        return original(x, *more, **named)
    gate_up, _ = self.gate_up_proj(x)
    is_16_bit = activations_are_16_bit()
    activations = silu_mul_quantize(gate_up, is_16_bit=is_16_bit)
    result: torch.Tensor = method.apply_quantized(activations, gate_up.dtype, self.down_proj.bias, is_16_bit=is_16_bit)
    return result


def rms_norm_layer(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """SGLang's `RMSNorm` in one launch; as in its own kernel, the residual is replaced by its sum with x."""
    is_ours = (
        isinstance(get_attn_backend(), KernelAttentionBackend)
        and x.dim() == 2
        and x.dtype in _FLOATS
        and x.dtype == (x if residual is None else residual).dtype
        and post_residual_addition is None
        and self.variance_size_override is None
        and self.override_orig_dtype is None
        and not self.cast_x_before_out_mul
        and not self.fp32_residual
    )
    if not is_ours:
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = self.forward_native(
            x, residual, post_residual_addition, quant_linear
        )
        return result
    normed = _normed(x.contiguous(), self, residual, self._quant_linear if quant_linear is None else quant_linear)
    return normed if residual is None else (normed, residual)


def _normed(x: torch.Tensor, norm: Any, residual: torch.Tensor | None, linear: Any) -> torch.Tensor:
    """Return the norm of x. linear: the layer that multiplies the result, if SGLang passed it to the norm."""
    if linear is None or not takes_quantized(linear.quant_method):
        return rms_norm(x, norm.weight, norm.variance_epsilon, residual)
    output, is_16_bit = torch.empty_like(x), activations_are_16_bit()
    hand_over_activations(
        output, rms_norm_quantize(x, norm.weight, norm.variance_epsilon, residual, is_16_bit=is_16_bit, output=output)
    )
    return output


def gemma3_rotation(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]], self: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of Gemma 3, `[requests, positions, head_dim]` in x's type, without a product of matrices.

    SGLang multiplies positions `[requests, 1, positions]` and frequencies as matrices, by cuBLAS in every decode step.
    """
    if "dynamic" in self.rope_type:
        return original(x, position_ids)
    halves = position_ids[:, :, None].float() * self.inv_freq.float().to(x.device)
    angles = torch.cat((halves, halves), dim=-1)
    scale = self.attention_scaling
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


_FUSED: Final[dict[str, Callable[..., Any]]] = {
    "Gemma3RotaryEmbedding": gemma3_rotation,
    "LlamaAttention": attention_layer,
    "Qwen2Attention": attention_layer,
    "Qwen3Attention": attention_layer,
    "LlamaMLP": mlp_layer,
    "Qwen2MLP": mlp_layer,
}
"""Class in SGLang's models -> the function that wraps its `forward`. Mistral uses Llama's; Qwen 3 has Qwen 2's MLP."""


_NORMS_UNTOLD: Final = ("Qwen3DecoderLayer",)
"""Layer classes whose norms SGLang does not give the layer that multiplies their result. Llama and Qwen 2 do get it."""


def fuse(model: torch.nn.Module) -> None:
    """Change the layers of a model in place."""
    for module in model.modules():
        if around := _FUSED.get(type(module).__name__):
            module.forward = functools.partial(around, module.forward, module)
        if type(module).__name__ in _NORMS_UNTOLD:
            layer: Any = module
            layer.input_layernorm.fuse_input_quant(layer.self_attn.qkv_proj)
            layer.post_attention_layernorm.fuse_input_quant(layer.mlp.gate_up_proj)


def register_norm(platform_key: str) -> None:
    """Make `rms_norm_layer` SGLang's forward function of RMSNorm on the platform with that key."""
    RMSNorm.register_oot_forward(RMSNorm, rms_norm_layer, platform_key)


def takes_quantized(method: Any) -> bool:
    """Whether every matrix of a layer multiplies int8 activations."""
    return isinstance(method, QuantizedLinearMethod) and method.is_packed


def _rotates_as_the_kernel(rotary: Any, x: torch.Tensor) -> bool:
    """Whether this is SGLang's plain rotation by a table, however the table was scaled."""
    return (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.cos_sin_cache.dtype == torch.float32
        and x.dtype in _FLOATS
    )


def _norms(attention: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """Return weights and epsilon of the norm of queries and keys, if there is one."""
    q_norm = getattr(attention, "q_norm", None)
    if q_norm is None:
        return None, None, 0.0
    return q_norm.weight, attention.k_norm.weight, q_norm.variance_epsilon
