"""The content of a GGUF file, under the names that SGLang's models use."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sglang_pascal.checkpoint.architectures import architecture_of
from sglang_pascal.errors import CheckpointError
from sglang_pascal.quantization.storage import Storage, storage_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_pascal.checkpoint.gguf_file import GgufFile

MERGED: Final[dict[str, tuple[tuple[str, str | int], ...]]] = {
    "qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
}
"""Layers in which SGLang's models join several matrices of the checkpoint: (their names, shard ids), in row order."""


@dataclass(frozen=True)
class MatrixInfo:
    """One weight matrix of the file."""

    name: str
    """SGLang's name, without `.weight`."""
    shard_id: str | int | None
    """The shard id that SGLang's `load_weights` passes; None if the layer has only this matrix."""
    storage: Storage
    rows: int
    columns: int

    def __str__(self) -> str:
        return f'tensor "{self.name}" of type {self.storage.tensor_type}, shape [{self.rows}, {self.columns}]'


class WeightTable:
    """The matrices of a file. It has no vectors (norms, biases): they are always loaded as floats."""

    def __init__(self, file: GgufFile) -> None:
        arch = architecture_of(file.metadata.get("general.architecture"))
        self._matrices: dict[str, MatrixInfo] = {}
        self._source = str(file.path)
        for name, info in file.tensors.items():
            hf_name = arch.hf_name(name)
            if hf_name is None or len(info.shape) != 2:
                continue
            base = hf_name.removesuffix(".weight")
            storage = storage_of(info.tensor_type, name, info.shape)
            self._matrices[base] = MatrixInfo(base, None, storage, *info.shape)

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def parts_of(self, layer: str) -> list[MatrixInfo]:
        """Return the matrices of one of SGLang's layers, in row order.

        layer: its prefix, such as `model.layers.0.self_attn.qkv_proj`.
        """
        parent, _, last = layer.rpartition(".")
        if last not in MERGED:
            return [self._matrix(layer, None)]
        return [self._matrix(f"{parent}.{name}", shard_id) for name, shard_id in MERGED[last]]

    def _matrix(self, name: str, shard_id: str | int | None) -> MatrixInfo:
        if name not in self._matrices:
            raise CheckpointError(
                f'"{self._source}" has no tensor for "{name}", which its architecture needs; convert the model again'
            )
        info = self._matrices[name]
        return MatrixInfo(name, shard_id, info.storage, info.rows, info.columns)


def summary(matrices: Iterable[MatrixInfo]) -> str:
    """Return the number of matrices in each type, for the log.

    Example: `Q4_K 168, Q6_K 30, Q5_0 as Q8_0 without loss 12, BF16 as F16 1`.
    """
    counts = Counter(matrix.storage for matrix in matrices)
    return ", ".join(f"{_held(storage)} {count}" for storage, count in counts.most_common())


def _held(storage: Storage) -> str:
    match storage.how:
        case "native":
            return storage.tensor_type
        case "lossless":
            return f"{storage.tensor_type} as {storage.held} without loss"
        case _:
            return f"{storage.tensor_type} as {storage.held}"
