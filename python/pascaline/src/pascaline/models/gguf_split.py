"""Whether files are the parts of one split GGUF model: by their names and their headers, which must agree.

llama-gguf-split and gguf-py write `split.no` (from 0), `split.count` and `split.tensors.count` into every part, the
model's own metadata into the first, and name the parts STEM-00001-of-0000N.gguf. llama.cpp finds them by these names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn

from gguf_acceptance import Tensor, foreign_part

from pascaline.models.refusal import refuse, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.models.gguf_header import GgufHeader, Metadata

MAX_PARTS = 1024
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_TYPES = {NUMBER: "uint16", COUNT: "uint16", TENSORS: "int32"}
"""Types of the keys; llama.cpp refuses a file in which they have others."""
_MAXIMA = {NUMBER: MAX_PARTS - 1, COUNT: MAX_PARTS, TENSORS: (1 << 31) - 1}
_PARTS_OWN_KEYS = frozenset({NUMBER, "general.alignment"})
"""Keys that may differ between the parts of one model."""
_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.ASCII)
_HIDDEN_WIDE = re.compile(r"(blk\.\d+\.(attn|ffn)_norm|output_norm)\.weight")
"""Norms of one weight for each number of the hidden state, in every architecture that has them."""
AGAIN = "bring the parts of the split model here again, under the names that they were made with"


def whole_name(name: str) -> str:
    """Return a file's name without its suffix, and without the number of the part if it is named as one."""
    match = _NAME.fullmatch(name)
    return match["stem"] if match and match["stem"] else name.rpartition(".")[0] or name


def sibling_names(name: str) -> list[str] | None:
    """Return the names of all parts of the split model that a file's name implies; None if it implies none."""
    match = _NAME.fullmatch(name)
    count = int(match["parts"]) if match else 1
    if match is None or not 1 < count <= MAX_PARTS or not 1 <= int(match["part"]) <= count:
        return None
    return _names(match["stem"], count)


def part_names(name: str, header: GgufHeader) -> list[str] | None:
    """Return the names of all parts of the model that a file belongs to; None if it is a whole model by itself.

    Raises ModelError if its name and its header contradict each other.
    """
    metadata = header.metadata
    match = _NAME.fullmatch(name)
    named = (int(match["part"]), int(match["parts"])) if match else None
    # llama-gguf-split --merge leaves a count of 0 in a file that is whole.
    count = split_number(metadata, COUNT) if COUNT in metadata else 0
    if count < 2:
        _check_whole(header, named)
        return None
    number = split_number(metadata, NUMBER) + 1
    if match is None or named != (number, count):
        says = f", and is named part {named[0]} of {named[1]}" if named else ""
        metadata.fail(
            f"its header says that it is part {number} of {count} of a split model{says}: its name must end in "
            f"-{number:05d}-of-{count:05d}.gguf; give all parts the names that they were made with"
        )
    return _names(match["stem"], count)


def _names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{part + 1:05d}-of-{count:05d}.gguf" for part in range(count)]


def _check_whole(header: GgufHeader, named: tuple[int, int] | None) -> None:
    """Refuse a part that does not say how many parts there are."""
    metadata = header.metadata
    if named is not None and named[1] > 1:
        metadata.fail(
            f"it is named part {named[0]} of {named[1]} of a split model, and its header does not say so (split.count)"
            "; bring it here again, or rename it if it is a whole model"
        )
    if NUMBER in metadata and split_number(metadata, NUMBER) > 0:
        metadata.fail(f"it is part {split_number(metadata, NUMBER) + 1} of a split model without split.count; {AGAIN}")
    if TENSORS in metadata and split_number(metadata, TENSORS) != len(header.tensors):
        metadata.fail(
            f"it holds {len(header.tensors)} tensors, must be {split_number(metadata, TENSORS)} ({TENSORS}): "
            f"it is a part of a split model; {AGAIN}"
        )


def check_parts(headers: Sequence[GgufHeader], names: Sequence[str]) -> None:
    """Refuse files that are not the complete parts of one model, each once and in order."""
    first = headers[0].metadata
    for index, header in enumerate(headers):
        _check_place(header.metadata, index, len(headers))
        _check_kinship(header.metadata, first, index, len(headers))
    _check_tensors(headers, names)
    _check_quantization(headers)


def check_hidden_size(headers: Sequence[GgufHeader], hidden: int) -> None:
    """Refuse a part whose norms differ in length from the model's hidden state: it belongs to another model."""
    for index, header in enumerate(headers):
        for tensor in header.tensors:
            if _HIDDEN_WIDE.fullmatch(tensor.name) and tensor.shape != (hidden,):
                header.metadata.fail(
                    f"part {index + 1} of {len(headers)} of the split model is one of another: tensor "
                    f"{shown(tensor.name)} has shape {list(tensor.shape)}, must be [{hidden}]; {AGAIN}"
                )


def _check_place(metadata: Metadata, index: int, count: int) -> None:
    number = split_number(metadata, NUMBER)
    if number != index:
        metadata.fail(
            f"its name says part {index + 1} of {count} of the split model, its header part {number + 1}; {AGAIN}"
        )
    if (found := split_number(metadata, COUNT)) != count:
        metadata.fail(
            f"part {index + 1} of the split model says that there are {found} parts, the named part says {count}; "
            f"{AGAIN}"
        )


def _check_kinship(metadata: Metadata, first: Metadata, index: int, count: int) -> None:
    """Compare all keys that this part and the first one share."""
    for key in metadata:
        mine, other = metadata.field(key), first.field(key)
        if key in _PARTS_OWN_KEYS or mine is None or other is None:
            continue
        if (mine.value_type, mine.element_type, mine.count, mine.raw) != (
            other.value_type,
            other.element_type,
            other.count,
            other.raw,
        ):
            metadata.fail(
                f"part {index + 1} of {count} of the split model is one of another: its {shown(key)} is not that of "
                f"the first part; {AGAIN}"
            )


def _check_tensors(headers: Sequence[GgufHeader], names: Sequence[str]) -> None:
    holder: dict[str, int] = {}
    for index, header in enumerate(headers):
        for tensor in header.tensors:
            if tensor.name in holder:
                _refuse_split(
                    names[index], f"tensor {shown(tensor.name)} is in part {holder[tensor.name] + 1} too; {AGAIN}"
                )
            holder[tensor.name] = index
    # llama.cpp reads only the first part's count; the comparison of the other keys checks that all counts are equal.
    declared = split_number(headers[0].metadata, TENSORS)
    if declared != len(holder):
        _refuse_split(
            names[0], f"the {len(headers)} parts hold {len(holder)} tensors, must be {declared} ({TENSORS}); {AGAIN}"
        )


def _check_quantization(headers: Sequence[GgufHeader]) -> None:
    parts = [{each.name: Tensor(each.tensor_type, each.shape) for each in header.tensors} for header in headers]
    if (foreign := foreign_part(parts)) is not None:
        headers[foreign.index].metadata.fail(
            f"part {foreign.index + 1} of {len(headers)} of the split model does not belong to the others: "
            f"{foreign.sentence()}; {AGAIN}"
        )


def split_number(metadata: Metadata, key: str) -> int:
    """Return one of the three required numbers."""
    field, value = metadata.field(key), metadata.value(key)
    if field is None:
        metadata.fail(f"it is a part of a split model, and metadata key {shown(key)} is missing; {AGAIN}")
    if field.value_type != _TYPES[key] or not isinstance(value, int):
        metadata.fail(f"{shown(key)} is a value of type {field.value_type}, must be {_TYPES[key]}; {AGAIN}")
    if not 0 <= value <= _MAXIMA[key]:
        metadata.fail(f"{shown(key)} must be between 0 and {_MAXIMA[key]}, got {value!r}")
    return value


def _refuse_split(name: str, cause: str) -> NoReturn:
    refuse(f"the split model of {name}", cause)
