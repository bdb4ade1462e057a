"""The type in which a GGUF tensor is held on the device.

A type with kernels stays as it is. Some other types can be represented exactly in a type with kernels. The rest
become float16, which costs memory but no accuracy beyond float16's own: the scales of GGUF blocks are float16 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gguf_acceptance.dimensions import NO_WEIGHTS

from sglang_pascal.errors import CheckpointError
from sglang_pascal.kernels.formats import FORMATS

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

DENSE: Final = "F16"
"""Held as float16."""
LOSSLESS: Final = {"Q5_0": "Q8_0", "IQ4_NL": "Q8_0", "Q3_K": "Q6_K"}
"""Type -> a type with kernels that holds the same values exactly.

Q5_0, IQ4_NL: a scale and integers of at most 8 bits per 32 weights. Q3_K: a scale and 6-bit scales per 16 weights of 3
bits, where Q6_K has 8-bit scales and 6 bits.
"""
ALIGNMENT: Final = 64
"""Each matrix starts at a multiple of this number of bytes. Every type's tiles are multiples of it, so the quantised
matrices of a layer leave no gap between them."""


@dataclass(frozen=True)
class Storage:
    """How one tensor is held."""

    tensor_type: str
    """Type in the file."""
    held: str
    """Type in memory: a key of FORMATS, or DENSE."""

    @property
    def how(self) -> str:
        """Return `native`, `lossless` or `dense`."""
        if self.held == self.tensor_type:
            return "native"
        return "dense" if self.held == DENSE else "lossless"

    @property
    def is_dense(self) -> bool:
        """Whether it is held as float16."""
        return self.held == DENSE

    def n_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a matrix in memory, without padding to the alignment."""
        return 2 * rows * columns if self.is_dense else FORMATS[self.held].packed_bytes(rows, columns)


def storage_of(tensor_type: GGMLQuantizationType, name: str, shape: tuple[int, ...]) -> Storage:
    """Return how a tensor is held. Raises an error for a tensor that cannot be a weight matrix.

    name, shape: for the error only.
    """
    kind = tensor_type.name
    if kind in FORMATS:
        return Storage(kind, kind)
    if kind in LOSSLESS:
        return Storage(kind, LOSSLESS[kind])
    if kind in NO_WEIGHTS:
        native = ", ".join(FORMATS)
        raise CheckpointError(
            f'tensor "{name}" of shape {list(shape)} has type {kind}, which {NO_WEIGHTS[kind]}; '
            f"quantise the model to one of {native}"
        )
    return Storage(kind, DENSE)


def aligned(n_bytes: int) -> int:
    """Return the number rounded up to ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
