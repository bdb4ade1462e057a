"""Whether the parts of a split model come from one quantisation: by the types of the same matrices in several layers.

llama-gguf-split writes only the numbers of a split into later parts, so a part of the same model in another
quantisation has the right names, shapes and count. A quantisation by llama-quantize has one type for most kinds of
matrix (`attn_q`, `ffn_up`, …) in all layers, and changes others, at most half of them, from layer to layer
(llama_tensor_get_type in llama-quant.cpp). So a part is refused if two thirds of the kinds that it shares with the
parts before it, and at least three, have no type in common with theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .header import Tensor

LEAST_KINDS: Final = 3
"""Kinds of matrix by which a part is judged, at least."""
_LAYER_MATRIX: Final = re.compile(r"blk\.\d+\.(?P<kind>.+)\.weight")


@dataclass(frozen=True, slots=True)
class ForeignPart:
    """A part of another quantisation than the parts before it."""

    index: int
    kind: str
    """A kind of matrix by which it was found, such as `attn_q`."""
    types: tuple[str, ...]
    """Types of that kind in this part."""
    earlier_types: tuple[str, ...]
    """Types of that kind in the parts before it."""

    def sentence(self) -> str:
        """Say what was found; without the part's name."""
        return (
            f"it is of another quantisation: its {self.kind} matrices are {' and '.join(self.types)}, those of the "
            f"parts before it {' and '.join(self.earlier_types)}"
        )


def foreign_part(parts: Sequence[Mapping[str, Tensor]]) -> ForeignPart | None:
    """Return the first part, each given as its tensors by name, that is of another quantisation; None if none is."""
    earlier: dict[str, set[str]] = {}
    for index, part in enumerate(parts):
        own = _types_by_kind(part)
        # Routers and the like are never quantised, so they are the same in every quantisation.
        shared = [kind for kind in own if kind in earlier and own[kind] | earlier[kind] != {"F32"}]
        apart = [kind for kind in shared if not own[kind] & earlier[kind]]
        if len(apart) >= LEAST_KINDS and 3 * len(apart) >= 2 * len(shared):
            kind = apart[0]
            return ForeignPart(index, kind, tuple(sorted(own[kind])), tuple(sorted(earlier[kind])))
        for kind, types in own.items():
            earlier.setdefault(kind, set()).update(types)
    return None


def _types_by_kind(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1 and (match := _LAYER_MATRIX.fullmatch(name)):
            found.setdefault(match["kind"], set()).add(tensor.tensor_type)
    return found
