"""Mutations of sound headers: no crash, and a mutation that changes what is served is never accepted silently.

The same seed gives the same mutations. tests/models/test_damaged_files.py does the same with the bytes of whole files.
"""

from __future__ import annotations

import random

import pytest
from gguf_acceptance import Header, Tensor, Unread, accept
from gguf_acceptance.dimensions import NO_WEIGHTS, ROPE_FREQS
from sglang_pascal.checkpoint.chat_template import chat_templates, has_template
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.errors import CheckpointError
from support.sound_headers import MAY_BE_ABSENT, is_another_value, seeds, served

VALUES = (
    0,
    1,
    -1,
    7,
    2**31,
    2**32 - 1,
    2**63,
    0.0,
    -1.0,
    1e30,
    float("nan"),
    True,
    False,
    "",
    "x",
    "1",
    [],
    [1],
    [[1]],
)


def mutated(metadata: dict, tensors: dict, rng: random.Random) -> tuple[dict, dict, str]:
    """One change of a header, and which key or tensor it is of."""
    metadata, tensors = dict(metadata), dict(tensors)
    match rng.randrange(8):
        case 0:
            metadata.pop(what := rng.choice([*metadata]))
        case 1 | 2:
            what = rng.choice([*metadata])
            metadata[what] = retyped(metadata[what], rng)
        case 3:
            prefix = rng.choice([metadata["general.architecture"], "tokenizer.ggml", "rope", "split", "quantize"])
            metadata[what := f"{prefix}.{rng.choice(['x', 'scale', 'expert_count', 'pre', 'vision.y'])}"] = "x"
        case 4:
            tensors.pop(what := rng.choice([*tensors]))
        case 5:
            what, other = rng.sample([*tensors], 2)
            tensors[what], tensors[other] = tensors[other], tensors[what]
        case 6:
            what = rng.choice([*tensors])
            tensors[what] = Tensor(tensors[what].tensor_type, reshaped(tensors[what].shape, rng))
        case _:
            what = rng.choice([*tensors])
            tensors[what] = Tensor(rng.choice([*NO_WEIGHTS]), tensors[what].shape)
    return metadata, tensors, what


def retyped(value: object, rng: random.Random) -> object:
    """The value in another type or form, or another value."""
    forms = [rng.choice(VALUES), [value], str(value), Unread("string"), Unread("array", 3, "int32")]
    if isinstance(value, int | float):
        forms += [float(value), int(value), bool(value), [value, value]]
    if isinstance(value, list) and value:
        forms += [value[:-1], [*value, value[-1]], value[0], [str(each) for each in value]]
    return rng.choice(forms)


def reshaped(shape: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    return rng.choice([shape[::-1], (*shape, 1), shape[1:], (shape[0] + 1, *shape[1:]), (shape[0] // 2, *shape[1:])])


def prepared(metadata: dict, tensors: dict) -> None:
    """Whatever is accepted can be prepared; what the data of a tensor say, no header shows."""
    chat_templates(metadata)
    try:
        served(metadata, tensors)
    except CheckpointError as error:
        if ROPE_FREQS not in str(error):
            raise


@pytest.mark.parametrize(
    "mutations", [3000, pytest.param(100_000, marks=pytest.mark.slow("100,000 mutations, 15 seconds of one core"))]
)
def test_no_mutation_changes_what_is_served_without_a_word(mutations):
    rng = random.Random(mutations)
    sound = [(header, accept(Header(*header)), served(*header)) for header in seeds()]
    assert [verdict.refusals for _, verdict, _ in sound] == [[]] * len(sound)
    accepted = 0
    for number in range(mutations):
        header, before, right = sound[number % len(sound)]
        metadata, tensors, what = mutated(*header, rng)
        verdict = accept(Header(metadata, tensors))
        if verdict.refusals:
            assert all(isinstance(each, str) and len(each) < 2000 for each in verdict.refusals)
            continue
        accepted += 1
        is_told = verdict.defaults != before.defaults or has_template(metadata) != has_template(header[0])
        if not is_told and not is_another_value(header[0].get(what), metadata.get(what)) and what not in MAY_BE_ABSENT:
            assert served(metadata, tensors) == right, f"mutation {number}: {what} -> {metadata.get(what)!r}"
        if not any(isinstance(value, Unread) for value in metadata.values()):
            prepared(metadata, tensors)
    assert 0 < accepted < mutations / 2


@pytest.mark.parametrize(
    ("kept", "renamed", "said"),
    [
        ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "metadata key"),
        ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "two tensors are named"),
    ],
)
def test_what_is_there_twice_is_refused(tiny_model, tmp_path, kept, renamed, said):
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model("llama").path.read_bytes().replace(renamed.encode(), kept.encode()))
    with pytest.raises(CheckpointError, match=f'{said} "{kept}"'):
        GgufFile(path)
