"""Whatever the bytes, a reader answers with a model or with one clear sentence; and what is written is what is read."""

from __future__ import annotations

import json
import random

import pytest
from fuzz import fuzz_models
from hypothesis import given, settings
from hypothesis import strategies as st
from pascaline.errors import ModelError
from pascaline.models.ggml_types import TENSOR_TYPES
from pascaline.models.gguf_header import Metadata, read_header
from pascaline.models.json_file import parse_object
from pascaline.models.layers import differing, most_common_heads, sliding_layer_ids
from support.raw_models import CONFIG, LLAMA, MemorySource, gguf_file, tensor, value

SCALARS = st.one_of(
    st.tuples(st.just("uint8"), st.integers(0, 2**8 - 1)),
    st.tuples(st.just("int16"), st.integers(-(2**15), 2**15 - 1)),
    st.tuples(st.just("uint32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("int64"), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just("uint64"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("float64"), st.floats(allow_nan=False)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("string"), st.text(max_size=40)),
)
ARRAYS = st.one_of(
    st.lists(st.text(max_size=20), max_size=30).map(lambda items: ("array", ("string", items))),
    st.lists(st.integers(0, 255), max_size=30).map(lambda items: ("array", ("uint8", items))),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=2000).map(lambda items: ("array", ("int32", items))),
)
VALUES = st.dictionaries(st.text(max_size=20), st.one_of(SCALARS, ARRAYS), max_size=8)


def header(data: bytes, chunk_bytes: int) -> Metadata:
    return read_header(MemorySource("m.gguf", data, len(data), chunk_bytes)).metadata


def answer(data: bytes) -> str:
    try:
        header(data, 64)
    except ModelError as error:
        return str(error)
    return "read"


@given(values=VALUES, chunk_bytes=st.integers(1, 5000))
@settings(max_examples=150, deadline=None)
def test_metadata_is_read_as_it_was_written_whatever_the_chunks(
    values: dict[str, tuple[str, object]], chunk_bytes: int
) -> None:
    values.pop("general.alignment", None)
    metadata = header(gguf_file({key: value(*content) for key, content in values.items()}), chunk_bytes)
    assert list(metadata) == list(values)
    for key, (kind, content) in values.items():
        expected = content[1] if kind == "array" else content  # type: ignore[index]  # an array's content is a pair
        assert metadata.value(key) == expected


@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(sorted(TENSOR_TYPES)), st.integers(1, 4), st.lists(st.integers(1, 5), max_size=3)),
        max_size=6,
    ),
    alignment=st.sampled_from([1, 8, 32, 64, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_tensors_are_read_as_they_were_written(tensors: list[tuple[int, int, list[int]]], alignment: int) -> None:
    entries, expected, offset = [], [], 0
    for index, (number, blocks, rest) in enumerate(tensors):
        kind = TENSOR_TYPES[number]
        dimensions = [blocks * kind.block_elements, *rest]
        rows = 1
        for dimension in rest:
            rows *= dimension
        entries.append(tensor(f"t{index}", dimensions, number, offset))
        expected.append((f"t{index}", tuple(reversed(dimensions)), kind.name, rows * blocks * kind.block_bytes))
        offset += -(-rows * blocks * kind.block_bytes // alignment) * alignment
    metadata = LLAMA | {"general.alignment": value("uint32", alignment)}
    data = gguf_file(metadata, entries, data_bytes=offset, alignment=alignment)
    found = read_header(MemorySource("m.gguf", data, len(data))).tensors
    assert [(t.name, t.shape, t.tensor_type, t.n_bytes) for t in found] == expected
    assert all(t.data_offset % alignment == 0 for t in found)


@given(data=st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_bytes_after_the_magic_are_refused_or_read(data: bytes) -> None:
    assert answer(b"GGUF\x03\0\0\0" + data).startswith(("read", "failed to read m.gguf: "))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=20,
)


@given(content=st.dictionaries(st.text(max_size=10), JSON, max_size=6))
@settings(max_examples=150, deadline=None)
def test_sound_json_is_read_as_it_was_written(content: dict[str, object]) -> None:
    assert parse_object("f", json.dumps(content).encode()) == content


@given(key=st.sampled_from([*sorted(CONFIG), "text_config", "sliding_window", "layer_types"]), content=JSON)
@settings(max_examples=150, deadline=None)
def test_any_value_in_a_configuration_is_refused_or_read(key: str, content: object) -> None:
    files = {
        "config.json": json.dumps({**CONFIG, key: content}).encode(),
        "model.safetensors": b"\2" + bytes(7) + b"{}",
    }
    assert fuzz_models.check(files, 0) in ("read", "refused")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_models_are_refused_or_read(seed: int) -> None:
    """A short run of the fuzzer; tests/fuzz/fuzz_models.py does the long ones."""
    rng = random.Random(seed)
    seeds = fuzz_models.gguf_seeds() + fuzz_models.safetensors_seeds()
    outcomes = {fuzz_models.check(fuzz_models.mutate(rng, rng.choice(seeds)), 1024) for _ in range(1000)}
    assert outcomes == {"read", "refused"}


@given(layers=st.integers(0, 200), period=st.integers(0, 12), first=st.booleans())
@settings(max_examples=150, deadline=None)
def test_one_layer_in_each_period_is_full(layers: int, period: int, first: bool) -> None:
    sliding = sliding_layer_ids(layers, period, full_layer_first=first)
    assert sliding == tuple(sorted(set(sliding)))
    full = sorted(set(range(layers)) - set(sliding))
    if period == 0:
        assert not full
    else:
        assert full == list(range(0 if first else period - 1, layers, period))


@given(heads=st.lists(st.integers(0, 4), max_size=12))
def test_most_common_heads_leaves_layers_without_any_out(heads: list[int]) -> None:
    common = most_common_heads(heads)
    counts = [heads.count(number) for number in set(heads) if number]
    assert heads.count(common) == max(counts) if counts else common == 0
    assert differing(heads) == (tuple(heads) if len(set(heads)) > 1 else None)
