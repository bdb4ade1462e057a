"""A split model whose part comes from another quantisation of the same model is refused, a mixture of types is not."""

from __future__ import annotations

import pytest
from gguf_acceptance import Tensor, foreign_part
from gguf_acceptance.parts import ForeignPart

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
Q4_K_M = dict.fromkeys(("attn_v", "ffn_down"), ("Q6_K", "Q4_K"))
Q5_K_M = dict.fromkeys(("attn_v", "ffn_down"), ("Q6_K", "Q5_K"))
Q4_K_S = dict.fromkeys(("attn_v", "ffn_down"), ("Q5_K", "Q5_K", "Q4_K", "Q4_K", "Q4_K", "Q4_K"))
IQ3_XS = dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), ("IQ3_S", "IQ3_XXS", "IQ3_XXS", "IQ3_XXS"))


def layers(first: int, end: int, types: dict[str, tuple[str, ...]], base: str) -> dict[str, Tensor]:
    """Layers of matrices of the base type; a kind in `types` has those, one layer after the other."""
    found = {}
    for layer in range(first, end):
        found[f"blk.{layer}.attn_norm.weight"] = Tensor("F32", (64,))
        for kind in KINDS:
            of_kind = types.get(kind, (base,))
            found[f"blk.{layer}.{kind}.weight"] = Tensor(of_kind[layer % len(of_kind)], (64, 64))
    return found


@pytest.mark.parametrize(("types", "base"), [({}, "Q8_0"), ({}, "F16"), ({}, "F32"), (Q5_K_M, "Q5_K")])
@pytest.mark.parametrize("foreign", [1, 2, 3])
def test_a_part_of_another_quantisation_is_found(types, base, foreign):
    parts = [layers(2 * part, 2 * part + 2, Q4_K_M, "Q4_K") for part in range(4)]
    parts[foreign] = layers(2 * foreign, 2 * foreign + 2, types, base)
    found = foreign_part(parts)
    assert found == ForeignPart(foreign, "attn_q", (base,), ("Q4_K",))
    assert found.sentence() == (
        f"it is of another quantisation: its attn_q matrices are {base}, those of the parts before it Q4_K"
    )


def test_the_second_part_is_named_if_the_first_is_foreign():
    found = foreign_part([layers(0, 2, {}, "Q8_0"), layers(2, 4, {}, "Q4_K"), layers(4, 6, {}, "Q4_K")])
    assert found is not None
    assert found.index == 1


@pytest.mark.parametrize(
    ("types", "base"), [({}, "Q4_K"), (Q4_K_M, "Q4_K"), (Q4_K_S, "Q4_K"), (IQ3_XS, "IQ3_XXS")], ids=str
)
@pytest.mark.parametrize("at", range(1, 8))
def test_a_mixture_is_one_quantisation_wherever_it_is_split(types, base, at):
    assert foreign_part([layers(0, at, types, base), layers(at, 8, types, base)]) is None


def test_parts_without_layers_in_common_are_not_judged():
    head = {"token_embd.weight": Tensor("Q8_0", (8, 64)), "output_norm.weight": Tensor("F32", (64,))}
    assert foreign_part([{}, head, layers(0, 1, {}, "Q4_K"), {"output.weight": Tensor("F16", (8, 64))}]) is None


def test_a_router_is_the_same_in_every_quantisation():
    routers = [{f"blk.{part}.ffn_gate_inp.{name}.weight": Tensor("F32", (8, 64)) for name in "abcd"} for part in (0, 1)]
    found = foreign_part([routers[0] | layers(0, 1, {}, "Q4_K"), routers[1] | layers(1, 2, {}, "Q8_0")])
    assert found is not None
    assert found.kind == "attn_q"
