"""Reads a GGUF file: metadata by struct, tensors as views of the memory-mapped file.

gguf-py's own reader keeps an array object per string, which takes seconds on a vocabulary; this one takes tenths.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    name: str
    tensor_type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch: (rows, columns) for a matrix. The file stores the reverse."""
    data_offset: int
    """Bytes from the start of the file."""
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows of the innermost dimension."""
        return prod(self.shape[:-1])


class GgufFile:
    """An open GGUF file; a context manager. Views returned by `rows` hold the mapping open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        header = _HeaderReader(self._map, path)
        self.metadata: dict[str, Any]
        """Every key of the header; arrays are lists."""
        self.tensors: dict[str, TensorInfo]
        """By the file's own names, in the file's order."""
        self.metadata, self.tensors = header.read()
        self.header_bytes = header.end
        """Length of everything before the tensor data."""

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close: views may be alive; the mapping goes with the last of them."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._map)

    def header_sha256(self) -> str:
        """Checksum of the header, in hexadecimal: fast to compute, and different for another file or conversion."""
        return hashlib.sha256(memoryview(self._map)[: self.header_bytes]).hexdigest()

    def rows(self, name: str) -> NDArray[np.uint8]:
        """Raw bytes of a tensor, `[n_rows, bytes per row]`, without a copy."""
        info = self.tensors[name]
        flat = np.frombuffer(self._map, dtype=np.uint8, count=info.n_bytes, offset=info.data_offset)
        return flat.reshape(info.n_rows, -1)


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f'"{path}" is not a GGUF file: it does not start with "GGUF"')
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as exc:
        raise CheckpointError(f'model file "{path}" does not exist') from exc
    except OSError as exc:
        raise CheckpointError(f'failed to read model file "{path}": {exc.strerror or exc}') from exc


class _HeaderReader:
    """A cursor over the header; any read past the end means a truncated file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = len(MAGIC)
        self.end = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Metadata and tensors."""
        try:
            return self._read()
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError) as exc:
            raise self._damaged(f"its header ends or breaks at byte {self._at}") from exc

    def _read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version = self._scalar(_U32)
        if version not in SUPPORTED_VERSIONS:
            allowed = ", ".join(map(str, SUPPORTED_VERSIONS))
            raise CheckpointError(f'"{self._path}" has GGUF version {version}; supported are {allowed}')
        n_tensors, n_keys = self._scalar(_U64), self._scalar(_U64)
        metadata = {}
        for _ in range(n_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar(_U32))
        entries = [self._tensor_entry() for _ in range(n_tensors)]
        self.end = self._at
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        infos = (self._tensor_info(start, *entry) for entry in entries)
        return metadata, {info.name: info for info in infos}

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f'"{self._path}" is damaged or incomplete: {what}; copy or download it again')

    def _scalar(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return value

    def _string(self) -> str:
        length = self._scalar(_U64)
        if length > len(self._data) - self._at:
            raise self._damaged(f"its header ends or breaks at byte {self._at}")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"unknown value type {kind} at byte {self._at}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar(_U32), self._scalar(_U64)
        if kind not in _SCALARS:
            return [self._value(kind) for _ in range(count)]
        item = _SCALARS[kind]
        if count * item.size > len(self._data) - self._at:
            raise self._damaged(f"its header ends or breaks at byte {self._at}")
        values = struct.unpack_from(f"<{count}{item.format[-1]}", self._data, self._at)
        self._at += count * item.size
        return list(values)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        n_dims = self._scalar(_U32)
        shape = tuple(self._scalar(_U64) for _ in range(n_dims))
        return name, shape[::-1], self._scalar(_U32), self._scalar(_U64)

    def _tensor_info(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError as exc:
            raise CheckpointError(f'tensor "{name}" of "{self._path}" has the unknown type {kind}') from exc
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if not shape or shape[-1] % block:
            raise self._damaged(f'tensor "{name}" has shape {shape}, which {tensor_type.name} cannot hold')
        n_bytes = prod(shape) // block * block_bytes
        if start + offset + n_bytes > len(self._data):
            missing = start + offset + n_bytes - len(self._data)
            raise self._damaged(f'tensor "{name}" ends {missing} bytes past the end of the file')
        return TensorInfo(name, tensor_type, shape, start + offset, n_bytes)
