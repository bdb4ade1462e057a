"""Activations that a norm has quantised in its own launch, passed to the layer that multiplies them next.

Between a norm and its layer SGLang passes one tensor, the same object. The activations travel as an attribute of this
tensor and can be taken once. If the attribute is lost (a copy, a view), the layer quantises by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

    from sglang_pascal.ops.activations import Activations

_ATTRIBUTE: Final = "pascal_activations"


def hand_over_activations(x: torch.Tensor, activations: Activations) -> None:
    """Attach the activations to x. x: the same rows as floats."""
    setattr(x, _ATTRIBUTE, activations)


def take_activations(x: torch.Tensor) -> Activations | None:
    """Return the activations attached to x, or None; only the first caller gets them."""
    activations: Activations | None = vars(x).pop(_ATTRIBUTE, None)
    return activations
