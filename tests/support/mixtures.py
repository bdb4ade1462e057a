"""Mixtures of experts with the published shapes, as the header of a GGUF file in Q4_K_M describes them."""

from __future__ import annotations

from dataclasses import dataclass

from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.planning.mixtures import requantized


@dataclass(frozen=True)
class MixtureShape:
    """Sizes of a mixture whose layers all have experts, with norms of queries and keys if it is a Qwen 3."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    used: int
    inner: int
    vocabulary: int
    context: int = 32768


QWEN_3_30B_A3B = MixtureShape("qwen3moe", 48, 2048, 32, 4, 128, 128, 8, 768, 151936)
SMALL_MIXTRAL = MixtureShape("llama", 16, 2048, 16, 8, 128, 8, 2, 7168, 32000)


def mixture_spec(shape: MixtureShape, mixture: str = "Q4_K_M") -> ModelSpec:
    """Return what reading a file of this shape would give."""
    s = shape
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (s.vocabulary, s.hidden),
        "output_norm.weight": (s.hidden,),
        "output.weight": (s.vocabulary, s.hidden),
    }
    for layer in range(s.layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (s.hidden,),
            "attn_q": (s.heads * s.head_dim, s.hidden),
            "attn_k": (s.kv_heads * s.head_dim, s.hidden),
            "attn_v": (s.kv_heads * s.head_dim, s.hidden),
            "attn_output": (s.hidden, s.heads * s.head_dim),
            "ffn_norm": (s.hidden,),
            "ffn_gate_inp": (s.experts, s.hidden),
            "ffn_gate_exps": (s.experts, s.inner, s.hidden),
            "ffn_up_exps": (s.experts, s.inner, s.hidden),
            "ffn_down_exps": (s.experts, s.hidden, s.inner),
        }
        if s.architecture == "qwen3moe":
            parts |= {"attn_q_norm": (s.head_dim,), "attn_k_norm": (s.head_dim,)}
        sizes |= {f"blk.{layer}.{name}.weight": size for name, size in parts.items()}
    spec = ModelSpec(
        format="gguf",
        files=(),
        architecture=s.architecture,
        name=s.architecture,
        num_hidden_layers=s.layers,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        v_head_dim=s.head_dim,
        vocab_size=s.vocabulary,
        context_length=s.context,
        num_experts=s.experts,
        num_experts_per_token=s.used,
        moe_intermediate_size=s.inner if s.architecture == "qwen3moe" else None,
        tensors=tuple(TensorSpec(name, size, "F16", 0) for name, size in sizes.items()),
    )
    return requantized(spec, mixture)
