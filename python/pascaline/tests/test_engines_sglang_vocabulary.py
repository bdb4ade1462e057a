"""What plan, serve and doctor say of tokens and merges, which only a look into the file itself shows."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import TYPE_CHECKING

import pytest
from pascaline.engines.sglang.engine import SglangEngine
from pascaline.models.gguf import read_gguf
from support.differential.tiny import Tiny, write
from support.differential.vocabularies import NORMAL, byte_level, sentencepiece, with_tokens

if TYPE_CHECKING:
    from pathlib import Path

ENGINE = SglangEngine()


@pytest.mark.parametrize("vocabulary", [byte_level("qwen2"), sentencepiece()])
def test_a_sound_vocabulary(vocabulary: dict[str, object], tmp_path: Path) -> None:
    assert ENGINE.judge(read_gguf(write(tmp_path / "m.gguf", Tiny(vocabulary=vocabulary)))).refusals == []


def test_a_merge_of_no_tokens_and_a_token_twice_are_refused_by_name(tmp_path: Path) -> None:
    vocabulary = with_tokens(byte_level("gpt-2", merges=["t h", "xx yy"]), {"th": NORMAL})
    first = vocabulary["tokens"].index("th")
    spec = read_gguf(write(tmp_path / "m.gguf", Tiny(vocabulary=vocabulary)))
    assert ENGINE.judge(spec).refusals == [
        "tokenizer.ggml.merges[1] is 'xx yy', must be two tokens whose joining is a token; convert the model again",
        f"tokenizer.ggml.tokens[{len(vocabulary['tokens']) - 1}] is 'th', which is token {first} too; "
        "convert the model again",
    ]


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """The header shows only that there is a list of floats."""
    path, marker = tmp_path / "m.gguf", 1234.5
    vocabulary = sentencepiece()
    write(path, Tiny(vocabulary=vocabulary | {"scores": [marker, *vocabulary["scores"][1:]]}))
    path.write_bytes(path.read_bytes().replace(struct.pack("<f", marker), struct.pack("<f", math.nan), 1))
    (found,) = ENGINE.judge(read_gguf(path)).refusals
    assert found.startswith('metadata key "tokenizer.ggml.scores" is [nan, ')
    assert found.endswith(", must be an array of numbers")


def test_a_token_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, Tiny(vocabulary=with_tokens(sentencepiece(), {"<|unlikely|>": NORMAL})))
    path.write_bytes(path.read_bytes().replace(b"<|unlikely|>", b"<|unl\xffkely|>", 1))
    (found,) = ENGINE.judge(read_gguf(path)).refusals
    assert found.startswith(f"failed to read {path}: ")
    assert "UTF-8" in found


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", Tiny(vocabulary=byte_level("gpt-2", merges=["xx yy"])))
    assert len(ENGINE.judge(read_gguf(path)).refusals) == 1
    assert ENGINE.judge(read_gguf(write(path, Tiny()))).refusals == []


def test_of_a_file_elsewhere_only_the_header_is_judged(tmp_path: Path) -> None:
    spec = read_gguf(write(tmp_path / "m.gguf", Tiny(vocabulary=byte_level("gpt-2", merges=["xx yy"]))))
    assert ENGINE.judge(dataclasses.replace(spec, files=("https://example.org/m.gguf",))).refusals == []
    assert ENGINE.judge(dataclasses.replace(spec, files=(tmp_path / "gone.gguf",))).refusals == []
