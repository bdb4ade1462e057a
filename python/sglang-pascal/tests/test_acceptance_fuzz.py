"""Mutations of sound headers: no crash, and none that changes what is served is accepted without a word.

ACCEPTANCE_MUTATIONS sets how many are tried (100000 takes a few minutes); the same seed gives the same ones.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf_acceptance import Header, Tensor, Unread, Verdict, accept
from gguf_acceptance.dimensions import NO_WEIGHTS, ROPE_FREQS, TIED, read_dimensions, wanted_tensors
from gguf_acceptance.rope import llama3_factors
from sglang_pascal.checkpoint.chat_template import chat_templates, has_template
from sglang_pascal.checkpoint.config import generation_config, model_config
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.tokenizer import tokenizer_config
from sglang_pascal.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).parent))
from test_acceptance import FURTHER, SIZES, VOCABULARY

MUTATIONS = int(os.environ.get("ACCEPTANCE_MUTATIONS", "3000"))
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": True,
}
SCALINGS = (
    {},
    {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    {"rope.scale_linear": 2.0},
    {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 0.5,
        "rope.scaling.yarn_beta_fast": 64.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    },
)
MAY_BE_ABSENT = frozenset(
    {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eot", "eom", "unknown", "padding")}
    | {"tokenizer.ggml.eos_token_ids", "gemma3.final_logit_softcapping", ROPE_FREQS}
)
"""Most sound files lack these, and their absence says that there is no such token, no cap, no scaling."""
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


@dataclass
class Fake:
    """What the conversion reads of a file."""

    metadata: dict
    tensors: dict

    def rows(self, name: str) -> np.ndarray:
        assert name == ROPE_FREQS
        return np.array(llama3_factors(32, 10000.0, 8.0), np.float32).view(np.uint8).reshape(1, -1)


def seeds() -> list[tuple[dict, dict]]:
    """Sound headers of every architecture, vocabulary and scaling."""
    found = []
    for architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3"):
        for number, scaling in enumerate(SCALINGS if architecture != "gemma2" else SCALINGS[:1]):
            sizes = SIZES | FURTHER.get(architecture, {}) | scaling
            metadata = {"general.architecture": architecture}
            metadata |= {f"{architecture}.{key}": value for key, value in sizes.items()}
            metadata |= VOCABULARY | (SENTENCEPIECE if number % 2 else {"tokenizer.ggml.eot_token_id": 7})
            if number % 2:
                del metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.merges"]
            metadata |= {"tokenizer.chat_template": "{{ messages }}", "general.name": "seed"}
            found.append((metadata, tensors_of(metadata, architecture, biased=architecture == "llama" and number == 2)))
    return found


def tensors_of(metadata: dict, architecture: str, *, biased: bool) -> dict:
    dimensions = read_dimensions(Header(metadata, {}), architecture, Verdict())
    assert dimensions is not None
    has_scaling = any("rope.scal" in key for key in metadata)
    return {
        each.name: Tensor("F32" if len(each.shape) == 1 else "Q8_0", each.shape)
        for each in wanted_tensors(architecture, dimensions, biased=biased)
        if (each.name != ROPE_FREQS or not has_scaling) and (each.name != "output.weight" or architecture not in TIED)
    }


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


def served(metadata: dict, tensors: dict) -> list:
    """All that the engine is told."""
    file = Fake(metadata, tensors)
    tokenizer = {
        key: metadata.get(f"tokenizer.ggml.{key}")
        for key in ("model", "pre", "tokens", "token_type", "scores", "merges", "add_space_prefix")
    }
    if metadata.get("tokenizer.ggml.model") == "llama":
        tokenizer.pop("pre")  # SentencePiece splits nothing before it merges
    config, generation = model_config(file), generation_config(file)  # type: ignore[arg-type]
    return [config, generation, tokenizer_config(metadata), tokenizer, {**tensors}]


def is_another_value(before: object, after: object) -> bool:
    """Whether it is of the same kind: no one but its maker can know that a file says another number."""
    kinds = (bool, int | float, str, list)
    return any(isinstance(before, kind) and isinstance(after, kind) for kind in kinds) and before != after


def prepared(metadata: dict, tensors: dict) -> None:
    """Whatever is accepted can be prepared; what the data of a tensor say, no header shows."""
    chat_templates(metadata)
    try:
        served(metadata, tensors)
    except CheckpointError as error:
        if ROPE_FREQS not in str(error):
            raise


def test_no_mutation_changes_what_is_served_without_a_word():
    rng = random.Random(1)
    sound = [(header, accept(Header(*header)), served(*header)) for header in seeds()]
    assert [verdict.refusals for _, verdict, _ in sound] == [[]] * len(sound)
    accepted = 0
    for number in range(MUTATIONS):
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
    assert 0 < accepted < MUTATIONS / 2


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
