"""Factors of the rotation in a GGUF file: both engines refuse those that no number can be computed with."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from pascaline.engines.registry import engine_named
from pascaline.models.reader import read_model
from support.models import SHAPES, split_gguf, tiny, write_gguf
from support.raw_models import LLAMA, gguf_file, tensor

ENGINES = ("sglang", "llama.cpp")


def with_factor(path: Path, place: int, value: float) -> Path:
    """Write another number in the place of one of the factors."""
    found = next(each for each in read_model(path).tensors if each.name == "rope_freqs.weight")
    with path.open("r+b") as file:
        file.seek(found.data_offset + 4 * place)
        file.write(struct.pack("<f", value))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf", SHAPES["llama-3.1-8b"], "Q4_K_M", sparse=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_llama3s_factors(model: Path, engine: str) -> None:
    assert engine_named(engine).judge(read_model(model)).refusals == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [0.0, -2.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_divisor(model: Path, engine: str, value: float) -> None:
    assert engine_named(engine).judge(read_model(with_factor(model, 5, value))).refusals == [
        f'tensor "rope_freqs.weight" has the value {value:g} at place 5, must be a finite number above 0; '
        "copy or download the file again, or convert the model again"
    ]


def test_only_sglang_needs_them_to_follow_a_rule(model: Path) -> None:
    spec = read_model(with_factor(model, 0, 3.0))
    assert engine_named("llama.cpp").judge(spec).refusals == []
    assert engine_named("sglang").judge(spec).refusals == [
        'tensor "rope_freqs.weight" does not follow the Llama 3 rule (largest factor 8.0); '
        "this way of scaling positions is not supported"
    ]


def test_they_may_be_in_any_part(model: Path) -> None:
    write_gguf(model, tiny("llama"), "Q8_0")
    factors = tensor("rope_factors_long.weight", (2,), 0, 0)
    model.write_bytes(gguf_file(LLAMA, [factors]) + struct.pack("<8f", 1.0, float("nan"), *[0.0] * 6))
    last = split_gguf(model, 1)[0]
    assert engine_named("llama.cpp").judge(read_model(last)).refusals == [
        'tensor "rope_factors_long.weight" has the value nan at place 1, must be a finite number above 0; '
        "copy or download the file again, or convert the model again"
    ]
