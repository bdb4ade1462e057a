"""The header of one GGUF file (versions 2 and 3): metadata, read lazily, and the position of each tensor.

Tensor data is never read. Arrays of the metadata (a vocabulary of 150,000 strings) are skipped without creating
Python objects for their elements. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Not gguf-py's reader, which needs numpy and makes an array for every string of every list. Here a file that was made
to harm costs bounded time and memory, which tests/fuzz checks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gguf_acceptance import Unread

from pascaline.errors import ModelError
from pascaline.models.ggml_types import REMOVED_TENSOR_TYPES, TENSOR_TYPES
from pascaline.models.impostors import head_of, impostor
from pascaline.models.refusal import MOST_SHOWN, refuse, shown
from pascaline.models.spec import TensorSpec
from pascaline.models.tensor_checks import check_extents, check_unique_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.models.source import Source

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 64 << 20
"""A header beyond this is refused; vocabularies of 262,144 tokens and tokenisers kept as JSON stay below 25 MiB."""
MAX_TENSORS = 1 << 16
"""Most tensors of one file; models with hundreds of experts have a few thousand."""
MAX_KEYS = 1 << 16
MAX_NAME_BYTES = (1 << 16) - 1
"""Longest key or tensor name; the specification's limit of a key."""
MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS of ggml."""
MAX_NESTING = 4
MAX_NESTED_ARRAYS = 1 << 16
"""Most arrays inside arrays of one header; llama.cpp writes none."""
MAX_ELEMENTS = (1 << 63) - 1
"""GGML counts elements and bytes in a signed 64-bit number."""
KEPT_BYTES = 4096
"""A value up to this size is kept in memory; a larger one is read again when it is requested."""

_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALAR_BYTES = {number: struct.calcsize("<" + code) for number, code in _SCALARS.items()}
_VALUE_TYPES = {
    0: "uint8",
    1: "int8",
    2: "uint16",
    3: "int16",
    4: "uint32",
    5: "int32",
    6: "float32",
    7: "bool",
    8: "string",
    9: "array",
    10: "uint64",
    11: "int64",
    12: "float64",
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Scalar = bool | int | float | str
Value = Scalar | list["Value"]


class _Cursor:
    """A place in the header that moves forward through a window of the source."""

    def __init__(self, source: Source, offset: int = 0) -> None:
        self.source = source
        self.limit = min(source.size, MAX_HEADER_BYTES)
        self._start = offset
        self._window = b""
        self._at = 0
        self.nested_arrays = 0

    @property
    def offset(self) -> int:
        """Bytes from the start of the file."""
        return self._start + self._at

    def fail(self, cause: str) -> NoReturn:
        """Refuse the file."""
        refuse(self.source.name, cause)

    def require(self, size: int, what: str) -> None:
        """Refuse the file if fewer than `size` bytes are left in it."""
        if size <= self.limit - self.offset:
            return
        if self.source.size > self.limit:
            self.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes, the most that is read: it is not a model")
        missing = self.offset + size - self.source.size
        self.fail(
            f"it is truncated: {what} at byte {self.offset} needs {missing} more bytes than the file's "
            f"{self.source.size}; download it again"
        )

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes."""
        if self._at + size > len(self._window):
            self._fill(size, what)
        start = self._at
        self._at += size
        return self._window[start : self._at]

    def u32(self, what: str) -> int:
        """The next number of 4 bytes."""
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """The next number of 8 bytes."""
        return int(_U64.unpack(self.take(8, what))[0])

    def text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        """The next string."""
        length = self.u64(what)
        if length > limit:
            self.fail(f"{what} at byte {self.offset} has {length} bytes, must be at most {limit}")
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} {_shown(data)} at byte {self.offset - length} is not UTF-8: {error.reason}")

    def skip(self, size: int, what: str) -> None:
        """Skip bytes without reading them."""
        self.require(size, what)
        self._at += size

    def skip_strings(self, count: int, what: str) -> None:
        """Skip strings. This loop runs a hundred thousand times, so it handles numbers only."""
        self.require(8 * count, what)
        length_at = _U64.unpack_from
        while count:
            if self._at + 8 > len(self._window):
                self._fill(8, what)
            window, at = self._window, self._at
            last = len(window) - 8
            while count and at <= last:
                at += 8 + length_at(window, at)[0]
                count -= 1
            self._at = at
            self.require(0, what)

    def _fill(self, size: int, what: str) -> None:
        self.require(size, what)
        offset = self.offset
        self._window = self.source.read_at(offset, min(max(size, self.source.chunk_bytes), self.limit - offset))
        self._start, self._at = offset, 0


@dataclass(frozen=True, slots=True)
class MetadataField:
    """One value of the metadata, or its position if it is large."""

    value_type: str
    """GGUF's name: `uint32`, `string`, `array`, …"""
    element_type: str | None
    """Type of the elements of an array."""
    count: int
    """Elements of an array, 1 for others."""
    offset: int
    """Bytes from the start of the file to the value, after its type."""
    raw: bytes | None
    """The value as it is stored, if it is small."""


class Metadata:
    """Key-value pairs of one file. A value is decoded when it is requested; large ones are read again from the file."""

    def __init__(self, source: Source, fields: dict[str, MetadataField]) -> None:
        self._source = source
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def field(self, key: str) -> MetadataField | None:
        """Type and length of a value, without decoding it; None if the key is absent."""
        return self._fields.get(key)

    def fail(self, cause: str) -> NoReturn:
        """Refuse the file that this metadata comes from."""
        refuse(self._source.name, cause)

    def value(self, key: str) -> Value | None:
        """The decoded value; None if the key is absent. Works for large values only while the file is open."""
        field = self._fields.get(key)
        if field is None:
            return None
        source = self._source if field.raw is None else _Kept(self._source.name, field.raw, field.offset)
        return _read_value(_Cursor(source, field.offset), _TYPE_NUMBERS[field.value_type], key)

    def plain(self) -> dict[str, Any]:
        """Every value as plain data; large ones, and text that is not UTF-8, as Unread."""
        return {key: self._plain(key, field) for key, field in self._fields.items()}

    def _plain(self, key: str, field: MetadataField) -> Any:
        unread = Unread(field.value_type, field.count, field.element_type)
        if field.raw is None:
            return unread
        try:
            return self.value(key)
        except ModelError:
            return unread


@dataclass(frozen=True, slots=True)
class _Kept:
    """The bytes of a small value, with their offset in the file."""

    name: str
    data: bytes
    start: int
    chunk_bytes: int = KEPT_BYTES

    @property
    def size(self) -> int:
        return self.start + len(self.data)

    def read_at(self, offset: int, size: int) -> bytes:
        return self.data[offset - self.start : offset - self.start + size]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file."""

    version: int
    metadata: Metadata
    tensors: tuple[TensorSpec, ...]
    alignment: int
    file_bytes: int
    """Size of the whole file."""


def read_header(source: Source, file_index: int = 0) -> GgufHeader:
    """Read one file's header; its tensors get this `file_index`."""
    cursor = _Cursor(source)
    version = _read_version(cursor)
    tensor_count = _read_count(cursor, "tensors", MAX_TENSORS)
    key_count = _read_count(cursor, "metadata keys", MAX_KEYS)
    metadata = Metadata(source, _read_metadata(cursor, key_count))
    alignment = _alignment(metadata)
    entries = [_read_tensor(cursor, alignment) for _ in range(tensor_count)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = tuple(
        TensorSpec(
            entry.name, entry.shape, entry.tensor_type, entry.n_bytes, data_start + entry.data_offset, file_index
        )
        for entry in entries
    )
    check_unique_names(cursor.source.name, tensors)
    check_extents(cursor.source.name, cursor.source.size, tensors)
    return GgufHeader(version, metadata, tensors, alignment, source.size)


_TYPE_NUMBERS = {name: number for number, name in _VALUE_TYPES.items()}


def _shown(data: bytes) -> str:
    return ascii(data[:MOST_SHOWN])


def _read_version(cursor: _Cursor) -> int:
    if cursor.source.size == 0:
        cursor.fail("it is empty; download it again")
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        cursor.fail(f"it is not a GGUF file: it starts with {magic!r}, must start with {MAGIC!r}{_hint(cursor)}")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        cursor.fail(
            "it is a big-endian GGUF file, must be little-endian; convert it with llama.cpp's gguf-convert-endian"
        )
    if version not in VERSIONS:
        cursor.fail(f"its GGUF version is {version}, must be 2 or 3; convert the model again with a current llama.cpp")
    return version


def _hint(cursor: _Cursor) -> str:
    what = impostor(head_of(cursor.source))
    return f"; {what}" if what else ""


def _read_count(cursor: _Cursor, what: str, limit: int) -> int:
    count = cursor.u64(f"the number of {what}")
    if count > limit:
        cursor.fail(f"it declares {count} {what}, must be at most {limit}")
    return count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataField]:
    fields: dict[str, MetadataField] = {}
    for _ in range(count):
        key = cursor.text("metadata key", MAX_NAME_BYTES)
        if key in fields:
            cursor.fail(f"metadata key {shown(key)} is there twice")
        fields[key] = _pass_field(cursor, key)
    return fields


def _pass_field(cursor: _Cursor, key: str) -> MetadataField:
    """Skip one value and remember its position."""
    value_type = _read_type(cursor, key)
    offset = cursor.offset
    if value_type != _ARRAY:
        raw = _pass_scalar(cursor, value_type, key)
        return MetadataField(_VALUE_TYPES[value_type], None, 1, offset, raw)
    element_type, count = _pass_array_head(cursor, key)
    width = _SCALAR_BYTES.get(element_type)
    if width is not None and width * count <= KEPT_BYTES:
        head = _U32.pack(element_type) + _U64.pack(count)
        raw = head + cursor.take(width * count, shown(key))
    else:
        _pass_elements(cursor, element_type, count, key, 1)
        raw = None
    return MetadataField("array", _VALUE_TYPES[element_type], count, offset, raw)


def _pass_scalar(cursor: _Cursor, value_type: int, key: str) -> bytes | None:
    if value_type != _STRING:
        return cursor.take(_SCALAR_BYTES[value_type], shown(key))
    length = cursor.u64(shown(key))
    if length > KEPT_BYTES:
        cursor.skip(length, shown(key))
        return None
    return _U64.pack(length) + cursor.take(length, shown(key))


def _pass_array_head(cursor: _Cursor, key: str) -> tuple[int, int]:
    element_type = _read_type(cursor, key)
    return element_type, cursor.u64(shown(key))


def _pass_elements(cursor: _Cursor, element_type: int, count: int, key: str, depth: int) -> None:
    if element_type == _STRING:
        cursor.skip_strings(count, shown(key))
    elif element_type != _ARRAY:
        cursor.skip(_SCALAR_BYTES[element_type] * count, shown(key))
    else:
        if depth == MAX_NESTING:
            cursor.fail(f"metadata key {shown(key)} nests arrays more than {MAX_NESTING} deep")
        cursor.nested_arrays += count
        if cursor.nested_arrays > MAX_NESTED_ARRAYS:
            cursor.fail(f"metadata key {shown(key)} holds more than {MAX_NESTED_ARRAYS} arrays")
        for _ in range(count):
            _pass_elements(cursor, *_pass_array_head(cursor, key), key, depth + 1)


def _read_type(cursor: _Cursor, key: str) -> int:
    number = cursor.u32(shown(key))
    if number not in _VALUE_TYPES:
        cursor.fail(f"metadata key {shown(key)} has value type {number}, must be 0 to {max(_VALUE_TYPES)}")
    return number


def _read_value(cursor: _Cursor, value_type: int, key: str) -> Value:
    """Decode a value that was skipped before, so its size has been checked."""
    if value_type == _STRING:
        return cursor.text(f"the value of {shown(key)}")
    if value_type != _ARRAY:
        value: Scalar = struct.unpack("<" + _SCALARS[value_type], cursor.take(_SCALAR_BYTES[value_type], shown(key)))[0]
        return value
    element_type, count = _pass_array_head(cursor, key)
    if element_type in _SCALARS:
        data = cursor.take(_SCALAR_BYTES[element_type] * count, shown(key))
        return list(struct.unpack(f"<{count}{_SCALARS[element_type]}", data))
    return [_read_value(cursor, element_type, key) for _ in range(count)]


def _alignment(metadata: Metadata) -> int:
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata.value("general.alignment")
    field = metadata.field("general.alignment")
    if field is None or field.value_type != "uint32" or not isinstance(alignment, int) or alignment.bit_count() != 1:
        metadata.fail(f"general.alignment is {alignment!r}, must be a power of two stored as uint32")
    return alignment


def _read_tensor(cursor: _Cursor, alignment: int) -> TensorSpec:
    """One tensor's entry; its data_offset counts from the start of the data, which is known only after the last."""
    name = cursor.text("tensor name", MAX_NAME_BYTES)
    what = f"tensor {shown(name)}"
    shape = _read_shape(cursor, what)
    number = cursor.u32(what)
    data_offset = cursor.u64(what)
    if data_offset % alignment:
        cursor.fail(f"{what} starts at {data_offset}, must be a multiple of {alignment}")
    if number not in TENSOR_TYPES:
        cursor.fail(f"{what} has {_unknown_type(number)}")
    kind = TENSOR_TYPES[number]
    if shape[-1] % kind.block_elements:
        cursor.fail(
            f"{what} has rows of {shape[-1]} weights, must be a multiple of {kind.block_elements} ({kind.name})"
        )
    n_elements = 1
    for dimension in shape:
        n_elements *= dimension
    n_bytes = n_elements // kind.block_elements * kind.block_bytes
    if max(n_elements, n_bytes + data_offset) > MAX_ELEMENTS:
        cursor.fail(f"{what} of shape {shape} at {data_offset} is larger than any file")
    return TensorSpec(name, shape, kind.name, n_bytes, data_offset)


def _read_shape(cursor: _Cursor, what: str) -> tuple[int, ...]:
    count = cursor.u32(what)
    if not 1 <= count <= MAX_DIMENSIONS:
        cursor.fail(f"{what} has {count} dimensions, must be between 1 and {MAX_DIMENSIONS}")
    shape = struct.unpack(f"<{count}Q", cursor.take(8 * count, what))[::-1]
    if 0 in shape:
        cursor.fail(f"{what} has shape {shape}, must have no dimension of 0")
    return shape


def _unknown_type(number: int) -> str:
    if number in REMOVED_TENSOR_TYPES:
        return f"type {number} ({REMOVED_TENSOR_TYPES[number]}), which ggml no longer has; convert the model again"
    return f"type {number}, which is not one of ggml's: the file is damaged, or made for a newer version"
