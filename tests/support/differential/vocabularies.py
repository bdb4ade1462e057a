"""Vocabularies of tiny models: the keys under `tokenizer.ggml`.

Merges are learnt from the texts of `texts` without any splitting, so that they cross the borders of words, digits and
spaces: a rule for splitting that differs gives other tokens.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any, Final

from support.differential.texts import NASTY

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type`: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
SPECIAL: Final = ("<unk>", "<s>", "</s>")
MARKED: Final = {
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<tool>": USER,
    "\t\t": USER,
}
"""Added tokens, behind all others."""
BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
MERGES: Final = 300
SPACE: Final = "\u2581"

Keys = dict[str, Any]


def byte_level(pre: str | None, **changes: Any) -> Keys:
    """Byte-level BPE, whose texts are split by the rule of this name; None = the key is absent."""
    alphabet, merges = _learnt_bytes()
    return _keys("gpt2", [*alphabet, *dict.fromkeys("".join(merge) for merge in merges)], NORMAL) | (
        {"merges": [" ".join(merge) for merge in merges]} | ({"pre": pre} if pre else {}) | changes
    )


def sentencepiece(**changes: Any) -> Keys:
    """SentencePiece BPE with tokens for single bytes."""
    alphabet, merges = _learnt_characters()
    made = dict.fromkeys("".join(merge) for merge in merges)
    keys = _keys("llama", [*BYTES, *made, *alphabet], NORMAL)
    keys["token_type"][3:259] = [BYTE] * 256
    keys["scores"] = [0.0] * 259 + [-1.0 - rank for rank in range(len(keys["tokens"]) - 259)]
    return keys | changes


def sentencepiece_without_bytes() -> Keys:
    """SentencePiece BPE in which a character that is no token is unknown."""
    keys = sentencepiece()
    return keys | {name: [*keys[name][:3], *keys[name][259:]] for name in ("tokens", "token_type", "scores")}


def texts_beyond(keys: Keys) -> tuple[str, ...]:
    """The texts with a character that is no token, outside of the tokens that are written out."""
    known = {*keys["tokens"], " "}
    marked = "|".join(map(re.escape, (*MARKED, *SPECIAL)))
    return tuple(text for text in NASTY if set(re.sub(marked, "", text)) - known)


def word_pieces(**changes: Any) -> Keys:
    """BERT's vocabulary, which no generating model has."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(chr, range(33, 127)),
        *(f"##{chr(c)}" for c in range(97, 123)),
    ]
    return {
        "model": "bert",
        "tokens": words,
        "token_type": [CONTROL] * 5 + [NORMAL] * (len(words) - 5),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "unknown_token_id": 1,
        "padding_token_id": 0,
        "seperator_token_id": 3,
    } | changes


def without(keys: Keys, *names: str) -> Keys:
    """The same without some keys."""
    return {name: value for name, value in keys.items() if name not in names}


def with_tokens(keys: Keys, tokens: dict[str, int]) -> Keys:
    """The same with further tokens of these types at the end."""
    more = {
        "tokens": [*keys["tokens"], *tokens],
        "token_type": [*keys["token_type"], *tokens.values()],
    }
    if "scores" in keys:
        more["scores"] = [*keys["scores"], *[-1000.0] * len(tokens)]
    return keys | more


def _keys(model: str, pieces: list[str], kind: int) -> Keys:
    return {
        "model": model,
        "tokens": [*SPECIAL, *pieces, *MARKED],
        "token_type": [
            UNKNOWN,
            CONTROL,
            CONTROL,
            *[kind] * len(pieces),
            *MARKED.values(),
        ],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


@functools.cache
def _learnt_bytes() -> tuple[list[str], list[tuple[str, str]]]:
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = ["".join(piece for piece, _ in split.pre_tokenize_str(text)) for text in NASTY]
    return sorted(ByteLevel.alphabet()), _learn(texts)


@functools.cache
def _learnt_characters() -> tuple[list[str], list[tuple[str, str]]]:
    texts = [text.replace(" ", SPACE) for text in NASTY]
    merges = _learn([text for text in texts if text.isprintable()])
    return sorted({character for merge in merges for half in merge for character in half}), merges


def _learn(texts: list[str]) -> list[tuple[str, str]]:
    """The most frequent pair again and again, the first in order of text if there are several."""
    words = [list(text) for text in texts]
    merges: list[tuple[str, str]] = []
    taken = {*SPECIAL, *MARKED, *BYTES}  # no text may be two tokens
    while len(merges) < MERGES:
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(
            (pair for pair in counts if "".join(pair) not in taken),
            key=lambda pair: counts[pair],
        )
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
