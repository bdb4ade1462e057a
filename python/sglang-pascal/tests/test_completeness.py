"""A model that is loaded in part is refused in the engine's process, fused layers shard by shard."""

from __future__ import annotations

import pytest
import torch
from sglang_pascal.checkpoint.completeness import Completeness, load_completely
from sglang_pascal.errors import CheckpointError

SHARDS = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1)}


class Fused(torch.nn.Linear):
    """A layer whose loader takes a part of its rows, as SGLang's fused layers do."""

    def __init__(self, shards: tuple) -> None:
        super().__init__(2, len(shards))
        for parameter in self.parameters():
            parameter.weight_loader = lambda parameter, loaded, shard=None: parameter.data[
                shards.index(shard) if shard is not None else slice(None)
            ].copy_(loaded)


def copy(parameter, loaded):
    """SGLang's loader of a parameter that has none of its own."""
    parameter.data.copy_(loaded)


def model() -> torch.nn.Module:
    layer = torch.nn.ModuleDict({name: Fused(shards) for name, shards in SHARDS.items()})
    layer["norm"] = torch.nn.LayerNorm(2)
    return torch.nn.ModuleDict({"layer": layer})


def load(model: torch.nn.Module, without: tuple[str, ...] = ()) -> None:
    for name, parameter in model.named_parameters():
        loader = parameter.weight_loader
        shards = SHARDS.get(name.split(".")[-2])
        for shard in shards or (None,):
            if name not in without and f"{name}:{shard}" not in without:
                shape = parameter.shape[1:] if shards else parameter.shape
                loader(parameter, torch.ones(shape), *(() if shard is None else (shard,)))


def test_a_whole_model_is_accepted_with_its_weights_in_place():
    whole = model()
    completeness = Completeness(whole, copy)
    load(whole)
    completeness.require()
    assert all((parameter == 1).all() for parameter in whole.parameters())


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("layer.norm.weight", '"layer.norm.weight"'),
        ("layer.qkv_proj.weight:k", '"layer.qkv_proj.weight" (its k_proj)'),
        ("layer.gate_up_proj.bias:1", '"layer.gate_up_proj.bias" (its up_proj)'),
        ("layer.qkv_proj.weight", '"layer.qkv_proj.weight" (its q_proj, k_proj, v_proj)'),
    ],
)
def test_what_got_no_weights_is_named(missing, said):
    partial = model()
    completeness = Completeness(partial, copy)
    load(partial, (missing,))
    with pytest.raises(CheckpointError) as error:
        completeness.require()
    assert str(error.value) == (
        f"parameter {said} got no weights: the model file lacks a tensor; copy or download it again, "
        "or convert the model again"
    )


def test_a_tensor_that_is_fused_on_disk_fills_all_shards():
    whole = model()
    completeness = Completeness(whole, copy)
    load(whole, ("layer.qkv_proj.weight",))
    parameter = whole["layer"]["qkv_proj"].weight
    parameter.weight_loader(parameter, torch.ones(3, 2))
    completeness.require()


@pytest.mark.filterwarnings("ignore:Only CUDA")  # of SGLang's imports
@pytest.mark.imports_sglang
def test_a_load_by_sglang_itself_is_watched():
    whole = model()
    assert load_completely(lambda model, weights: load(model, weights) or "done", whole, ()) == "done"
    with pytest.raises(CheckpointError, match=r'"layer\.norm\.weight" got no weights'):
        load_completely(lambda model, weights: load(model, weights), model(), ("layer.norm.weight",))


def test_experts_are_loaded_by_name_and_number():
    mixture = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2, bias=False)})
    parameter = mixture["experts"].weight
    parameter.weight_loader = lambda parameter, loaded, name, shard_id, expert_id: parameter.data.copy_(loaded)
    completeness = Completeness(mixture, copy)
    parameter.weight_loader(parameter, torch.ones(2, 2), "w1.weight", shard_id="w1", expert_id=0)
    completeness.require()
