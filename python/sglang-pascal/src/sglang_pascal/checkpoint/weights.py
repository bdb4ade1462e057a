"""Streams a model's tensors under Hugging Face names, in the file's own types, and undoes the converter's changes.

Rows of every quantised type can be reordered without decoding, because a row is a whole number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf_acceptance.dimensions import one_for_all

from sglang_pascal.checkpoint.architectures import Architecture, architecture_of
from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from sglang_pascal.checkpoint.gguf_file import GgufFile, TensorInfo


@dataclass(frozen=True)
class RawTensor:
    """One weight as SGLang's `load_weights` names it, still in the file's type."""

    hf_name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Shape of the decoded tensor, outermost dimension first."""
    rows: NDArray[np.uint8]
    """`[rows, bytes per row]`; may be a read-only view of the file."""


_F32: Final = GGMLQuantizationType.F32


def raw_tensors(file: GgufFile) -> Iterator[RawTensor]:
    """Yield every weight of the file, in the file's order (which is the order on disk)."""
    arch = architecture_of(file.metadata.get("general.architecture"))
    for name, info in file.tensors.items():
        if (hf_name := arch.hf_name(name)) is not None:
            yield _raw_tensor(file, arch, info, hf_name)


def _raw_tensor(file: GgufFile, arch: Architecture, info: TensorInfo, hf_name: str) -> RawTensor:
    rows = file.rows(info.name)
    if arch.is_permuted(info.name):
        rows = _whole(rows, info)[_unpermuted_order(info.shape[0], _heads(file, arch, info.name))]
        if len(info.shape) == 1:
            rows = rows.reshape(1, -1)
    if arch.is_offset_norm(info.name):
        if info.tensor_type != _F32:
            raise CheckpointError(f'norm "{info.name}" has type {info.tensor_type.name}; only F32 norms are supported')
        rows = (rows.view(np.float32) - np.float32(arch.norm_offset)).view(np.uint8)
    return RawTensor(hf_name, info.tensor_type, info.shape, rows)


def _whole(rows: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.uint8]:
    """Return one entry per output feature: the rows of a matrix, the elements of a bias."""
    return rows if len(info.shape) > 1 else rows.reshape(info.shape[0], -1)


def _heads(file: GgufFile, arch: Architecture, name: str) -> int:
    key = "head_count_kv" if ".attn_k." in name else "head_count"
    metadata = file.metadata
    value = metadata.get(f"{arch.name}.attention.{key}", metadata[f"{arch.name}.attention.head_count"])
    heads = one_for_all(value)
    assert heads is not None  # the acceptance has checked it
    return heads


def _unpermuted_order(n_rows: int, n_heads: int) -> NDArray[np.intp]:
    """Return the indices that take rows from adjacent-pair order to Hugging Face's half-and-half order.

    The converter turned a head of (half, pair) into (pair, half); this reads it back.
    """
    return np.arange(n_rows).reshape(n_heads, n_rows // n_heads // 2, 2).swapaxes(1, 2).reshape(-1)
