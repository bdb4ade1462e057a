"""Mutations of whole sound files, of one part or two: no crash, and none that changes what is served is accepted
without a word.

The files are bytes in memory. They are read as `plan` reads them and judged for the engine sglang; what is accepted is
compared with what the sound model gives the engine. The same seed gives the same mutations.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_acceptance import Header, Tensor, Verdict, accept
from pascaline.errors import ModelError
from pascaline.models.gguf import read_gguf_parts
from pascaline.models.gguf_header import read_header
from sglang_pascal.checkpoint.chat_template import has_template
from support.raw_models import MemoryFolder, gguf_file, string, tensor, value
from support.sound_headers import MAY_BE_ABSENT, is_another_value, seeds, served

if TYPE_CHECKING:
    from collections.abc import Callable

SCALARS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool")
SPLIT_KINDS = {"split.no": "uint16", "split.count": "uint16", "split.tensors.count": "int32"}
MOST_WORDS = 2000
"""Longest reason, characters."""


@dataclass(frozen=True)
class Entry:
    """One metadata key as it stands in a file."""

    key: str
    kind: str
    content: Any

    @functools.cached_property
    def data(self) -> bytes:
        """Key and value; most of them are those of a sound model, which thousands of mutations share."""
        return string(self.key) + value(self.kind, self.content)


@dataclass(frozen=True)
class Part:
    """One file of a model; its name follows from its place."""

    entries: tuple[Entry, ...]
    tensors: tuple[tuple[str, Tensor], ...]

    def data(self) -> bytes:
        placed, offset = [], 0
        for name, (kind, shape) in self.tensors:
            number = GGMLQuantizationType[kind]
            placed.append(tensor(name, shape[::-1], number, offset))
            block, block_bytes = GGML_QUANT_SIZES[number]
            offset += -(-(prod(shape) // block * block_bytes) // 32) * 32
        # A key may be there twice, so it is not a dictionary that is written.
        head = [each.data for each in self.entries]
        empty = gguf_file({}, placed, data_bytes=offset, key_count=len(head))
        before = 4 + 4 + 8 + 8
        header = empty[:before] + b"".join(head) + b"".join(placed)
        return header + bytes(-len(header) % 32 + offset)


@dataclass
class Case:
    """A model in files, and what a mutation did to it."""

    parts: list[Part]
    names: list[str] = field(default_factory=list)
    change: str = ""
    """The function that made it."""
    key: str = ""
    """The key that was changed, if it was one key."""
    is_free: bool = False
    """Whether it says something else that is equally valid, so that only the file's author can know that it is wrong."""

    def files(self) -> dict[str, bytes]:
        return {name: part.data() for name, part in zip(self.names, self.parts, strict=True)}


def sound(metadata: dict[str, Any], tensors: dict[str, Tensor], parts: int) -> Case:
    """A model that is split into the given number of parts."""
    entries = tuple(entry_of(key, content) for key, content in metadata.items())
    listed = tuple(tensors.items())
    if parts == 1:
        return Case([Part(entries, listed)], ["m.gguf"])
    share = -(-len(listed) // parts)
    found = []
    for number in range(parts):
        numbers = {"split.no": number, "split.count": parts, "split.tensors.count": len(listed)}
        own = tuple(Entry(key, SPLIT_KINDS[key], content) for key, content in numbers.items())
        found.append(Part((() if number else entries) + own, listed[number * share : (number + 1) * share]))
    return Case(found, [f"m-{number + 1:05d}-of-{parts:05d}.gguf" for number in range(parts)])


def entry_of(key: str, content: Any) -> Entry:
    if isinstance(content, list):
        kind = "string" if isinstance(content[0], str) else "float32" if isinstance(content[0], float) else "int32"
        return Entry(key, "array", (kind, content))
    kinds: dict[type, str] = {bool: "bool", int: "uint32", float: "float32", str: "string"}
    return Entry(key, kinds[type(content)], content)


def mutated(case: Case, other: Case, rng: random.Random) -> Case:
    """One change; other: another sound model, in as many parts."""
    case = replace(case, parts=list(case.parts), names=list(case.names))
    change = rng.choice(PART_CHANGES if len(case.parts) > 1 and rng.random() < 0.4 else CHANGES)
    case.change = change.__name__
    change(case, other, rng)
    return case


def _change_entries(case: Case, rng: random.Random, make: Callable[[list[Entry], int], None]) -> None:
    """Let `make` change the list of one part, at a place of it."""
    at = rng.randrange(len(case.parts))
    entries = list(case.parts[at].entries)
    place = rng.randrange(len(entries))
    case.key = entries[place].key
    make(entries, place)
    case.parts[at] = replace(case.parts[at], entries=tuple(entries))


def drop_key(case: Case, _other: Case, rng: random.Random) -> None:
    _change_entries(case, rng, lambda entries, place: entries.pop(place))  # type: ignore[arg-type,return-value]


def double_key(case: Case, _other: Case, rng: random.Random) -> None:
    def make(entries: list[Entry], place: int) -> None:
        again = rng.choice((entries[place], replace(rng.choice(entries), key=entries[place].key)))
        entries.insert(rng.randrange(len(entries) + 1), again)

    _change_entries(case, rng, make)


def retype_key(case: Case, _other: Case, rng: random.Random) -> None:
    """The same value in another type, as far as that holds it."""

    def make(entries: list[Entry], place: int) -> None:
        entry = entries[place]
        kind = rng.choice((*SCALARS, "string", "array"))
        entries[place] = converted(entry, kind, rng)

    _change_entries(case, rng, make)


def converted(entry: Entry, kind: str, rng: random.Random) -> Entry:
    content = entry.content[1] if entry.kind == "array" else entry.content
    if kind == "string":
        return replace(entry, kind=kind, content=str(content))
    if kind == "array":
        values = content if isinstance(content, list) else [content]
        element = rng.choice(SCALARS) if all(isinstance(each, int | float) for each in values) else "string"
        return replace(entry, kind=kind, content=(element, [scalar(each, element) for each in values]))
    return replace(entry, kind=kind, content=scalar(content, kind))


def scalar(content: Any, kind: str) -> Any:
    """The value in this type, cut to the bits that it has."""
    if kind == "string":
        return str(content)
    number = content if isinstance(content, int | float) else 1
    if kind.startswith("float"):
        return float(number)
    if kind == "bool":
        return bool(number)
    bits = int(kind.removeprefix("u").removeprefix("int"))
    cut = int(number) & ((1 << bits) - 1)
    return cut if kind[0] == "u" or cut < 1 << (bits - 1) else cut - (1 << bits)


def rename_key(case: Case, _other: Case, rng: random.Random) -> None:
    """One character of the part behind the last point is another, or two keys have each other's values."""

    def make(entries: list[Entry], place: int) -> None:
        entry = entries[place]
        if rng.random() < 0.5:
            stem, _, last = entry.key.rpartition(".")
            at = rng.randrange(len(last))
            entries[place] = replace(entry, key=f"{stem}.{last[:at]}{rng.choice('abz_')}{last[at + 1 :]}")
            return
        second = rng.randrange(len(entries))
        entries[place], entries[second] = (
            replace(entries[second], key=entry.key),
            replace(entry, key=entries[second].key),
        )
        # Two numbers that are both possible where they stand: another sound model.
        case.is_free = entries[place].kind == entries[second].kind

    _change_entries(case, rng, make)


def shuffle(case: Case, _other: Case, rng: random.Random) -> None:
    """Change only the order, which has no meaning."""
    for at, part in enumerate(case.parts):
        case.parts[at] = Part(
            tuple(rng.sample(part.entries, len(part.entries))), tuple(rng.sample(part.tensors, len(part.tensors)))
        )


def _change_tensors(case: Case, rng: random.Random, make: Callable[[list[tuple[str, Tensor]], int], None]) -> None:
    at = rng.randrange(len(case.parts))
    tensors = list(case.parts[at].tensors)
    make(tensors, rng.randrange(len(tensors)))
    case.parts[at] = replace(case.parts[at], tensors=tuple(tensors))


def drop_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    def make(tensors: list[tuple[str, Tensor]], place: int) -> None:
        case.key = tensors.pop(place)[0]

    _change_tensors(case, rng, make)


def double_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    """A tensor again, in any part; its name may be that of another."""
    source = rng.choice(rng.choice(case.parts).tensors)
    again = (source[0], rng.choice(rng.choice(case.parts).tensors)[1]) if rng.random() < 0.5 else source
    at = rng.randrange(len(case.parts))
    case.parts[at] = replace(case.parts[at], tensors=(*case.parts[at].tensors, again))


def swap_tensors(case: Case, _other: Case, rng: random.Random) -> None:
    def make(tensors: list[tuple[str, Tensor]], place: int) -> None:
        second = rng.randrange(len(tensors))
        (one, first), (two, other) = tensors[place], tensors[second]
        tensors[place], tensors[second] = (one, other), (two, first)

    _change_tensors(case, rng, make)


def rename_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    def make(tensors: list[tuple[str, Tensor]], place: int) -> None:
        name, content = tensors[place]
        at = rng.randrange(len(name))
        case.key = name
        tensors[place] = (f"{name[:at]}{rng.choice('abz_.')}{name[at + 1 :]}", content)

    _change_tensors(case, rng, make)


def reshape_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    def make(tensors: list[tuple[str, Tensor]], place: int) -> None:
        name, (kind, shape) = tensors[place]
        shapes = (shape[::-1], (*shape, 1), (1, *shape), (shape[0] + 1, *shape[1:]), (prod(shape),), (64, *shape[1:]))
        fitting = [each for each in shapes if each[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0]
        tensors[place] = (name, Tensor(kind, rng.choice(fitting or [shape])))

    _change_tensors(case, rng, make)


def retype_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    def make(tensors: list[tuple[str, Tensor]], place: int) -> None:
        name, (_, shape) = tensors[place]
        kinds = [kind.name for kind, (block, _) in GGML_QUANT_SIZES.items() if shape[-1] % block == 0]
        tensors[place] = (name, Tensor(rng.choice(kinds), shape))
        case.is_free = True

    _change_tensors(case, rng, make)


def move_tensor(case: Case, _other: Case, rng: random.Random) -> None:
    """Point to another part that is equally valid."""
    source, target = rng.sample(range(len(case.parts)), 2)
    tensors = list(case.parts[source].tensors)
    moved = tensors.pop(rng.randrange(len(tensors)))
    case.parts[source] = replace(case.parts[source], tensors=tuple(tensors))
    case.parts[target] = replace(case.parts[target], tensors=(moved, *case.parts[target].tensors))


def drop_part(case: Case, _other: Case, rng: random.Random) -> None:
    at = rng.randrange(len(case.parts))
    del case.parts[at], case.names[at]


def exchange_parts(case: Case, _other: Case, rng: random.Random) -> None:
    at, other = rng.randrange(len(case.parts)), rng.randrange(len(case.parts))
    case.parts[at], case.parts[other] = case.parts[other], case.parts[at]


def copy_part(case: Case, _other: Case, rng: random.Random) -> None:
    at, other = rng.sample(range(len(case.parts)), 2)
    case.parts[at] = case.parts[other]


def foreign_part(case: Case, other: Case, rng: random.Random) -> None:
    """A later part of another model: only its tensors can show that, if their names and number are right."""
    at = rng.randrange(1, len(case.parts))
    case.parts[at] = other.parts[at]


def requantized_part(case: Case, _other: Case, rng: random.Random) -> None:
    at, kind = rng.randrange(1, len(case.parts)), rng.choice(("F16", "Q4_0"))
    tensors = [
        (name, Tensor(kind if len(each.shape) > 1 else "F32", each.shape)) for name, each in case.parts[at].tensors
    ]
    case.parts[at] = replace(case.parts[at], tensors=tuple(tensors))
    # A third of these models is less than a layer, which may share too few kinds of matrix with the others.
    case.is_free = len(case.parts) > 2


def renumber_part(case: Case, _other: Case, rng: random.Random) -> None:
    at, key = rng.randrange(len(case.parts)), rng.choice([*SPLIT_KINDS])
    entries = [replace(each, content=rng.randrange(40)) if each.key == key else each for each in case.parts[at].entries]
    case.parts[at] = replace(case.parts[at], entries=tuple(entries))


def rename_part(case: Case, _other: Case, rng: random.Random) -> None:
    at = rng.randrange(len(case.parts))
    case.names[at] = rng.choice(("m.gguf", "m-00001-of-00001.gguf", "M-00001-of-00002.gguf", "m-00003-of-00002.gguf"))


CHANGES = (
    drop_key,
    double_key,
    retype_key,
    rename_key,
    shuffle,
    drop_tensor,
    double_tensor,
    swap_tensors,
    rename_tensor,
    reshape_tensor,
    retype_tensor,
)
PART_CHANGES = (
    move_tensor,
    drop_part,
    exchange_parts,
    copy_part,
    foreign_part,
    requantized_part,
    renumber_part,
    rename_part,
)


def read(case: Case) -> Header | None:
    """The model with all of its vocabulary; None if the reader refuses it, in a sentence that can be shown."""
    folder = MemoryFolder(case.files())
    words = ""
    try:
        spec = read_gguf_parts(case.names[0], folder.open, str)
        with folder.open(str(spec.files[0])) as source:
            metadata = read_header(source).metadata
            values = {key: metadata.value(key) for key in metadata}
    except ModelError as error:
        words = str(error)
    assert words.isprintable()
    assert len(words) <= MOST_WORDS
    if words:
        return None
    return Header(values, {each.name: Tensor(each.tensor_type, each.shape) for each in spec.tensors})


def told(header: Header) -> list[Any]:
    """What the engine gets; a dictionary has no order."""
    return served(dict(header.metadata), dict(header.tensors))


def cases(parts: int) -> list[Case]:
    return [sound(metadata, tensors, parts) for metadata, tensors in seeds()]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    "mutations", [500, pytest.param(34_000, marks=pytest.mark.slow("100,000 damaged files, a minute of one core"))]
)
def test_no_damage_changes_what_is_served_without_a_word(parts: int, mutations: int) -> None:
    rng, models = random.Random(mutations + parts), cases(parts)
    sounds = [header for header in map(read, models) if header is not None]
    verdicts, right = list(map(accept, sounds)), list(map(told, sounds))
    assert [verdict.refusals for verdict in verdicts] == [[]] * len(models)
    outcomes: Counter[str] = Counter()
    for number in range(mutations):
        at = number % len(models)
        case = mutated(models[at], rng.choice(models), rng)
        header = read(case)
        if header is None:
            outcomes["not read"] += 1
            continue
        verdict = accept(header)
        assert len(verdict.sentence) <= MOST_WORDS
        outcomes["refused" if verdict.refusals else "accepted"] += 1
        if not verdict.refusals and not may_differ(case, sounds[at], header, verdicts[at], verdict):
            assert told(header) == right[at], f"mutation {number} of model {at}: {case.change} {case.key}"
    assert min(outcomes[each] for each in ("not read", "refused", "accepted")) > mutations / 20, outcomes


def may_differ(case: Case, before: Header, after: Header, first: Verdict, verdict: Verdict) -> bool:
    """Whether the model says something else that is equally valid, or a note names the new assumption."""
    is_told = verdict.defaults != first.defaults or has_template(before.metadata) != has_template(after.metadata)
    is_other = is_another_value(before.metadata.get(case.key), after.metadata.get(case.key))
    return case.is_free or is_told or is_other or case.key in MAY_BE_ABSENT
