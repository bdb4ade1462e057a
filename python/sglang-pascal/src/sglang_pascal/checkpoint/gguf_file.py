"""Reads a GGUF model of one or several files: metadata by struct, tensors as views of memory-mapped files.

gguf-py's own reader keeps an array object per string, which takes seconds for a vocabulary; this one takes tenths.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_acceptance import Tensor, foreign_part

from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAGIC: Final = b"GGUF"
SUPPORTED_VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
SPLIT_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.ASCII)
"""Name of a part of a split model, as llama-gguf-split and llama.cpp write it."""
SPLIT_TENSORS: Final = "split.tensors.count"
_PARTS_OWN_KEYS: Final = frozenset({"split.no", "general.alignment"})
"""Keys that differ between the parts of one model."""
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
    """Bytes from the start of its file."""
    n_bytes: int
    part: int = 0
    """Index of the model's file that holds it."""

    @property
    def n_rows(self) -> int:
        """Rows of the innermost dimension."""
        return prod(self.shape[:-1])


class GgufFile:
    """An open GGUF model; a context manager. Views returned by `rows` hold the mapping open."""

    def __init__(self, path: Path) -> None:
        """path: the file, or any part of a split model; the other parts are found beside it."""
        self.parts = open_parts(path)
        """The model's files, in order; only one if it is not split."""
        first = self.parts[0]
        self.path = first.path
        """The file, or the first part."""
        self.metadata = first.metadata
        """Every key of the header; arrays are lists."""
        self.tensors = {name: info for part in self.parts for name, info in part.tensors.items()}
        """By the file's own names, in the files' order."""
        self.header_bytes = first.header_bytes
        """Length of everything before the tensor data of the first file."""

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing: views may still be in use; the mapping goes with the last of them."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(part.data) for part in self.parts)

    def header_sha256(self) -> str:
        """Checksum of the headers, in hexadecimal: fast to compute, and different for another file or conversion."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(memoryview(part.data)[: part.header_bytes])
        return digest.hexdigest()

    def rows(self, name: str) -> NDArray[np.uint8]:
        """Return the raw bytes of a tensor, `[n_rows, bytes per row]`, without a copy."""
        info = self.tensors[name]
        data = self.parts[info.part].data
        flat = np.frombuffer(data, dtype=np.uint8, count=info.n_bytes, offset=info.data_offset)
        return flat.reshape(info.n_rows, -1)


@dataclass(frozen=True)
class GgufPart:
    """One open file of a model."""

    path: Path
    data: mmap.mmap
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header_bytes: int


def open_parts(path: Path) -> tuple[GgufPart, ...]:
    """Open the file and, if it is part of a split model, all other parts. They must be parts of one model."""
    asked = _open_part(path, 0)
    count = _split_number(asked, "split.count", default=0)
    if count <= 1:
        _check_whole(asked)
        return (asked,)
    names = _part_names(asked, count)
    parts = tuple(_open_sibling(path.with_name(name), index, count) for index, name in enumerate(names))
    for index, part in enumerate(parts):
        _check_part(part, index, parts[0], count)
    _check_tensors(parts)
    _check_quantization(parts)
    return parts


def _open_sibling(path: Path, index: int, count: int) -> GgufPart:
    try:
        return _open_part(path, index)
    except CheckpointError as exc:
        raise CheckpointError(f"part {index + 1} of {count} of the split model cannot be read: {exc}") from exc


def _open_part(path: Path, index: int) -> GgufPart:
    data = _map_file(path)
    header = _HeaderReader(data, path)
    metadata, tensors = header.read()
    placed = {name: replace(info, part=index) for name, info in tensors.items()}
    return GgufPart(path, data, metadata, placed, header.end)


def _check_whole(part: GgufPart) -> None:
    """Refuse a part whose header does not mention the other parts although its name does."""
    match = SPLIT_NAME.fullmatch(part.path.name)
    if match and int(match["parts"]) > 1:
        raise CheckpointError(
            f'"{part.path}" is named part {int(match["part"])} of {int(match["parts"])}, but its header has no '
            "split.count; copy or download it again, or rename it if it is a whole model"
        )


def _part_names(part: GgufPart, count: int) -> list[str]:
    number = _split_number(part, "split.no") + 1
    match = SPLIT_NAME.fullmatch(part.path.name)
    if match is None or (int(match["part"]), int(match["parts"])) != (number, count):
        raise CheckpointError(
            f'"{part.path}" is part {number} of {count} of a split model, so its name must end in '
            f"-{number:05d}-of-{count:05d}.gguf; give all parts the names that they were made with"
        )
    return [f"{match['stem']}-{index + 1:05d}-of-{count:05d}.gguf" for index in range(count)]


def _check_part(part: GgufPart, index: int, first: GgufPart, count: int) -> None:
    """Refuse a file that is not the part that its name says, or that belongs to another model."""
    # llama.cpp too reads the number of tensors only from the first part: the others may leave it out.
    for key, value in {"split.no": index, "split.count": count}.items():
        if (found := _split_number(part, key)) != value:
            raise CheckpointError(
                f'"{part.path}" is not part {index + 1} of {count} of this split model: its {key} is {found}, '
                f"must be {value}; copy or download it again"
            )
    for key in part.metadata.keys() & first.metadata.keys() - _PARTS_OWN_KEYS:
        if part.metadata[key] != first.metadata[key]:
            raise CheckpointError(
                f'"{part.path}" is a part of another model: its {key} is {part.metadata[key]!r}, that of '
                f'"{first.path}" is {first.metadata[key]!r}; copy or download it again'
            )


def _check_tensors(parts: tuple[GgufPart, ...]) -> None:
    """Refuse a tensor that is in two parts, and a wrong total number of tensors."""
    holder: dict[str, GgufPart] = {}
    for part in parts:
        for name in part.tensors:
            if name in holder:
                raise CheckpointError(
                    f'tensor "{name}" of a split model is in two parts, "{holder[name].path}" and "{part.path}"; '
                    "copy or download them again"
                )
            holder[name] = part
    declared = _split_number(parts[0], SPLIT_TENSORS)
    if len(holder) != declared:
        raise CheckpointError(
            f'the {len(parts)} parts of the split model "{parts[0].path}" hold {len(holder)} tensors, must be '
            f"{declared} ({SPLIT_TENSORS}); copy or download them again"
        )


def _check_quantization(parts: tuple[GgufPart, ...]) -> None:
    """Refuse a part with another quantisation than the parts before it."""
    tensors = [
        {name: Tensor(info.tensor_type.name, info.shape) for name, info in part.tensors.items()} for part in parts
    ]
    if (foreign := foreign_part(tensors)) is not None:
        raise CheckpointError(
            f'"{parts[foreign.index].path}" does not belong to the other parts: {foreign.sentence()}; '
            "copy or download it again"
        )


def _split_number(part: GgufPart, key: str, default: int | None = None) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        what = "is missing" if value is None else f"is {value!r}, must be a whole number"
        raise CheckpointError(f'{key} of "{part.path}", a part of a split model, {what}; copy or download it again')
    return value


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
    """A cursor over the header; a read past the end means that the file is cut off."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = len(MAGIC)
        self.end = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Return metadata and tensors."""
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
            if key in metadata:
                raise self._damaged(f'metadata key "{key}" is there twice')
            metadata[key] = self._value(self._scalar(_U32))
        entries = [self._tensor_entry() for _ in range(n_tensors)]
        self.end = self._at
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment.bit_count() != 1:
            raise self._damaged(f"general.alignment is {alignment!r}, must be a power of two")
        start = -(-self._at // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for entry in entries:
            info = self._tensor_info(start, *entry)
            if info.name in infos:
                raise self._damaged(f'two tensors are named "{info.name}"')
            infos[info.name] = info
        return metadata, infos

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
