"""Watches a model while it is loaded: every parameter must get weights, and a fused layer every shard.

SGLang fills the parameters that a checkpoint names and leaves the others uninitialised: a model that lacks a tensor
would look healthy and generate nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.errors import CheckpointError
from sglang_pascal.quantization.weight_table import MERGED

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_ALL: Final = "all"
"""Shard id of a parameter that is filled at once."""
_LOADER: Final = "weight_loader"
"""Attribute of a parameter with which SGLang's models fill it."""


class Completeness:
    """Records what is loaded into a model's parameters after its construction."""

    def __init__(self, model: torch.nn.Module, default_loader: Callable[..., Any]) -> None:
        """default_loader: fills a parameter that has no loader of its own."""
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._missing: dict[str, set[str | int]] = {name: _shards(name) for name in self._names.values()}
        for parameter in model.parameters():
            setattr(parameter, _LOADER, self._noting(getattr(parameter, _LOADER, default_loader)))

    def require(self) -> None:
        """Raise CheckpointError for parameters into which nothing was loaded."""
        missing = [_described(name, shards) for name, shards in self._missing.items() if shards]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"parameter {missing[0]}{more} got no weights: the model file lacks a tensor; copy or download it "
                "again, or convert the model again"
            )

    def _noting(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def loader(parameter: torch.nn.Parameter, loaded: torch.Tensor, *shard: str | int, **named: Any) -> Any:
            result = load(parameter, loaded, *shard, **named)
            ids = [*shard, *named.values()]
            name = self._names[id(parameter)]
            # A mixture's loader gets names and experts, not a shard; a fused layer may also be loaded at once.
            is_shard = _layer(name) in MERGED and ids and ids[0] is not None
            self._missing[name] -= {ids[0]} if is_shard else self._missing[name]
            return result

        return loader


def load_completely(load: Callable[..., Any], model: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    """Hook around SGLang's `load_weights_and_postprocess`. Raises CheckpointError as `Completeness.require`."""
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    completeness = Completeness(model, default_weight_loader)
    result = load(model, *arguments, **named)
    completeness.require()
    return result


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0].rpartition(".")[2]


def _shards(parameter: str) -> set[str | int]:
    """Return the shards that must be loaded into a parameter of this name."""
    layer = _layer(parameter)
    return {shard for _, shard in MERGED[layer]} if layer in MERGED else {_ALL}


def _described(parameter: str, missing: set[str | int]) -> str:
    layer = _layer(parameter)
    parts = [name for name, shard in MERGED.get(layer, ()) if shard in missing]
    return f'"{parameter}"' + (f" (its {', '.join(parts)})" if parts else "")
