"""Reads which GPU code a shared library holds: the architectures, and the names of the kernels.

nvcc puts a program's GPU code into the ELF section `.nv_fatbin`: one container for each translation unit, with one
entry for each architecture, either machine code (a cubin, itself an ELF file) or PTX. Only the 64 bytes before each
entry are read for the architectures, so that a library of a gigabyte takes under a second. NVIDIA publishes no
description of the layout. A test compares the results with `cuobjdump --list-elf --list-ptx` of CUDA 12.
"""

from __future__ import annotations

import functools
import mmap
import struct
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sglang_pascal.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SECTIONS: Final = (b".nv_fatbin", b"__nv_relfatbin")
"""Linked code, and code that the driver links when it loads it."""
_SECTION: Final = struct.Struct("<IIQQQQ")
"""sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size of an ELF64 section header."""
_NOBITS: Final = 8
_CONTAINER: Final = struct.Struct("<IHHQ")
"""Magic number, version, bytes of this header, bytes of the entries."""
_CONTAINER_MAGIC: Final = 0xBA55ED50
_ENTRY: Final = struct.Struct("<HHIQIIHHIIIQQQ")
"""Kind, version, bytes of this header, bytes of the payload with padding, without padding if compressed, options,
minor and major version of the tools, architecture, place and length of the file name, flags, 0, unpacked bytes."""
_KINDS: Final[dict[int, Literal["sm", "compute"]]] = {2: "sm", 1: "compute"}
_LZ4, _ZSTD, _SPECIFIC = 0x2000, 0x8000, 0x100000
"""Flags: how the payload is compressed; whether it is for exactly one architecture, such as sm_90a."""
_NAMES_START: Final = 64
"""Where a cubin's table of section names begins: after the ELF header."""
_KERNEL: Final = b".text."
"""A kernel's section is this and its mangled name."""


class MachineCodeError(PluginError):
    """A library cannot be read, or has a layout that is not known."""


@dataclass(frozen=True)
class Code:
    """GPU code for one architecture: `sm_60` is machine code, `compute_90` PTX, which the driver compiles."""

    kind: Literal["sm", "compute"]
    number: int
    """Ten times the major version plus the minor one."""
    is_specific: bool = False
    """Whether it runs on exactly this architecture, not on newer ones of the same major version (sm_90a)."""

    def __str__(self) -> str:
        return f"{self.kind}_{self.number}{'a' if self.is_specific else ''}"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a card runs it (sm_60 runs on 6.1, sm_61 not on 6.0), or its driver can compile it."""
        own, card = divmod(self.number, 10), tuple(capability)
        if self.is_specific:
            return own == card
        return own <= card and (self.kind == "compute" or own[0] == card[0])


@dataclass(frozen=True)
class _Entry:
    code: Code
    start: int
    n_bytes: int
    flags: int


def parse_code(name: str) -> Code | None:
    """Return the code of a name such as sm_60, sm_90a or compute_90; None if it is another word."""
    kind, _, digits = name.partition("_")
    number = digits.rstrip("af")
    if kind not in ("sm", "compute") or not number.isdigit():
        return None
    return Code("sm" if kind == "sm" else "compute", int(number), is_specific=digits.endswith("a"))


def architectures(library: Path) -> dict[Code, int]:
    """Return architecture -> number of entries of a library; empty if it holds no GPU code.

    Raises MachineCodeError if it cannot be read or is damaged.
    """
    try:
        state = library.stat()
    except OSError as exc:
        raise MachineCodeError(f"{library} cannot be read: {exc.strerror}; reinstall its package") from exc
    return dict(_architectures(library, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _architectures(library: Path, *_identity: int) -> Counter[Code]:
    """Count the entries once for each state of a file."""
    with _mapped(library) as data:
        return Counter(entry.code for entry in _entries(library, data))


def kernel_names(library: Path, wanted: Iterable[Code]) -> dict[Code, frozenset[str]]:
    """Return architecture -> mangled names of the kernels that a library holds as machine code for it.

    Raises MachineCodeError also if the code is compressed in a way that is not known here.
    """
    found: dict[Code, set[str]] = {code: set() for code in wanted}
    with _mapped(library) as data:
        for entry in _entries(library, data):
            if entry.code in found:
                found[entry.code] |= _names_of(library, data, entry)
    return {code: frozenset(names) for code, names in found.items()}


@contextmanager
def _mapped(library: Path) -> Iterator[mmap.mmap]:
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except (OSError, ValueError) as exc:  # mmap raises ValueError for an empty file
        raise MachineCodeError(f"{library} cannot be read: {exc}; reinstall its package") from exc
    except struct.error as exc:
        raise MachineCodeError(f"{library} is cut off or damaged ({exc}); reinstall its package") from exc


def _entries(library: Path, data: mmap.mmap) -> Iterator[_Entry]:
    for start, end in _code_sections(library, data):
        position = start
        # Containers are aligned; between two of them are zeros.
        while (position := data.find(_CONTAINER_MAGIC.to_bytes(4, "little"), position, end)) >= 0:
            _, _, header, length = _CONTAINER.unpack_from(data, position)
            first, last = position + header, position + header + length
            if last > end:
                raise MachineCodeError(f"{library}: GPU code at byte {position} is cut off; reinstall its package")
            yield from _entries_between(library, data, first, last)
            position = last


def _entries_between(library: Path, data: mmap.mmap, position: int, end: int) -> Iterator[_Entry]:
    while position < end:
        fields = _ENTRY.unpack_from(data, position)
        kind, header, padded, packed, number, flags = (fields[i] for i in (0, 2, 3, 4, 8, 11))
        if header < _ENTRY.size or position + header + padded > end:
            raise MachineCodeError(f"{library}: GPU code at byte {position} has an unknown layout; report it")
        if kind in _KINDS:  # others hold options of the linker, or an intermediate form for it
            code = Code(_KINDS[kind], number, is_specific=bool(flags & _SPECIFIC))
            yield _Entry(code, position + header, packed or padded, flags)
        position += header + padded


def _code_sections(library: Path, data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each section with GPU code in an ELF64 file."""
    if data[:5] != b"\x7fELF\x02":
        raise MachineCodeError(f"{library} is not a 64-bit ELF library; reinstall its package")
    (table,) = struct.unpack_from("<Q", data, 40)
    width, count, names_index = struct.unpack_from("<HHH", data, 58)
    headers = [_SECTION.unpack_from(data, table + i * width) for i in range(count)]
    names = headers[names_index][4] if headers else 0
    for name, kind, _, _, start, size in headers:
        begin = names + name
        if kind != _NOBITS and data[begin : data.find(b"\0", begin)] in _SECTIONS:
            yield start, start + size


def _names_of(library: Path, data: mmap.mmap, entry: _Entry) -> set[str]:
    payload = data[entry.start : entry.start + entry.n_bytes]
    if entry.flags & _ZSTD:
        raise MachineCodeError(f"{library}: its GPU code is compressed by zstd, which is not read here")
    table = _name_table(payload) if entry.flags & _LZ4 else payload
    if table[:4] != b"\x7fELF":
        raise MachineCodeError(f"{library}: its GPU code at byte {entry.start} is no cubin; report it")
    sections = bytes(table[_NAMES_START : _end_of_names(table)]).split(b"\0")
    return {name.removeprefix(_KERNEL).decode() for name in sections if name.startswith(_KERNEL)}


def _end_of_names(table: bytes | bytearray) -> int:
    """Return where the table of section names ends: the next table begins with an empty string. -1 if not reached."""
    return table.find(b"\0\0", _NAMES_START + 1)


def _name_table(payload: bytes) -> bytearray:
    """Unpack an LZ4 block until the cubin's section names are complete: they come before all code."""
    unpacked = bytearray()
    position, look = 0, 4096
    while position < len(payload):
        token = payload[position]
        length, position = _length(payload, position + 1, token >> 4)
        unpacked += payload[position : position + length]
        position += length
        if position >= len(payload):
            break
        distance = payload[position] | payload[position + 1] << 8
        length, position = _length(payload, position + 2, token & 15)
        _repeat(unpacked, distance, length + 4)
        if len(unpacked) >= look:
            if _end_of_names(unpacked) >= 0:
                break
            look += look // 2
    return unpacked


def _length(payload: bytes, position: int, length: int) -> tuple[int, int]:
    """Return a length of LZ4 (15 is continued by bytes, the last of which is below 255) and the place after it."""
    if length == 15:
        while True:
            more = payload[position]
            position += 1
            length += more
            if more != 255:
                break
    return length, position


def _repeat(unpacked: bytearray, distance: int, length: int) -> None:
    """Append `length` bytes that begin `distance` bytes before the end; they may overlap what they append."""
    start = len(unpacked) - distance
    piece = bytes(unpacked[start : start + length])
    unpacked += piece if len(piece) == length else (piece * (length // len(piece) + 1))[:length]
