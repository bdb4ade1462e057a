"""The factors of the rotation's frequencies that a GGUF file keeps as small tensors: configuration beside the weights.

A file on this machine is read; of one elsewhere the header alone is known.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_acceptance.dimensions import ROPE_FREQS
from gguf_acceptance.rope import RopeError, check_factors

from pascaline.errors import ModelError
from pascaline.models.source import open_file

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec, TensorSpec

FACTORS = (ROPE_FREQS, "rope_factors_long.weight", "rope_factors_short.weight")
MOST_BYTES = 1 << 16
"""More is no list of factors: a head has a factor for each two of its dimensions."""


def rope_factors(spec: ModelSpec, name: str = ROPE_FREQS) -> tuple[float, ...] | None:
    """Return the factors in the tensor of this name; None if the file lacks it or it cannot be read here."""
    tensor = next((each for each in spec.tensors if each.name == name), None)
    if tensor is None or tensor.tensor_type != "F32" or not 0 < tensor.n_bytes <= MOST_BYTES:
        return None
    file = spec.files[tensor.file_index]
    return _read(file, tensor) if isinstance(file, Path) else None


def factor_refusals(spec: ModelSpec) -> list[str]:
    """Return why an engine would compute no numbers with the factors, whatever rule they follow."""
    found = []
    for name in FACTORS:
        try:
            check_factors(rope_factors(spec, name) or (), name)
        except RopeError as error:
            found.append(str(error))
    return found


def _read(file: Path, tensor: TensorSpec) -> tuple[float, ...] | None:
    try:
        with open_file(file) as source:
            data = source.read_at(tensor.data_offset, tensor.n_bytes)
    except ModelError:
        return None
    return struct.unpack(f"<{tensor.n_elements}f", data)
