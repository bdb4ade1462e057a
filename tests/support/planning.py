"""Models and requests that several tests of the planner share; all in memory, no files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pascaline.cards import Card, load_card
from pascaline.models.spec import ModelSpec, TensorSpec
from pascaline.planning import PlanRequest
from pascaline.planning.mixtures import requantized
from support.models import SHAPES, Shape, tensor_shapes

P4 = load_card("tesla-p4")


def spec_of(shape: Shape, mixture: str = "Q4_K_M", **changes: Any) -> ModelSpec:
    """The spec that reading a GGUF file of this shape would give."""
    tensors = tuple(
        TensorSpec(name, size, "F32" if len(size) == 1 else "F16", _elements(size) * (4 if len(size) == 1 else 2))
        for name, size in tensor_shapes(shape).items()
    )
    spec = ModelSpec(
        format="gguf",
        files=(),
        architecture=shape.architecture,
        name=shape.name,
        num_hidden_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        tied_embeddings=shape.tied_embeddings,
        tensors=tensors,
    )
    return replace(requantized(spec, mixture), **changes)


def _elements(size: tuple[int, ...]) -> int:
    count = 1
    for dimension in size:
        count *= dimension
    return count


def request(card: Card = P4, **changes: Any) -> PlanRequest:
    """The profile's request on a card: SGLang, 4 requests of 4096 tokens, fp16."""
    values: dict[str, Any] = {"card_bytes": card.memory_bytes, "context_length": 4096} | changes
    return PlanRequest(**values)


LLAMA_2_7B = spec_of(SHAPES["llama-2-7b"])
LLAMA_3_8B = spec_of(SHAPES["llama-3.1-8b"])
QWEN_3_4B = spec_of(SHAPES["qwen3-4b"])
