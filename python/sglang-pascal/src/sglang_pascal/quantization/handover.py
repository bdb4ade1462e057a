"""Activations that a norm has quantised in its own launch, handed to the layer that multiplies them next.

Between a norm and its layer SGLang passes one tensor, the same object. The activations travel as an attribute of it and
are taken once; where it is lost (a copy, a view), the layer quantises as it always can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from sglang_pascal.ops.activations import Activations

_ATTRIBUTE: Final = "pascal_activations"


def hand_over(x: torch.Tensor, activations: Activations) -> None:
    """x: the floats of the same rows."""
    setattr(x, _ATTRIBUTE, activations)


def take(x: torch.Tensor) -> Activations | None:
    """What was handed over with x, if anything; only the first taker gets it."""
    activations: Activations | None = vars(x).pop(_ATTRIBUTE, None)
    return activations
