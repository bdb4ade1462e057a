"""GGUF metadata -> a Hugging Face tokenizer: tokenizer.json and tokenizer_config.json.

Two families (`tokenizer.ggml.model`): `gpt2` is byte-level BPE with a pre-tokenizer named by `tokenizer.ggml.pre`;
`llama` is SentencePiece BPE, whose merges follow from the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gguf_acceptance.vocabulary import control_ids, special_id
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_USER_DEFINED: Final = 4
"""Value of `tokenizer.ggml.token_type`: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
_SPACE: Final = "\u2581"
"""SentencePiece's character for a space."""

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN: Final = _CONTRACTIONS + "|" + _WORDS_AND_SPACES % r"\p{N}{1,3}"
_QWEN2_PATTERN: Final = _CONTRACTIONS + "|" + _WORDS_AND_SPACES % r"\p{N}"
_GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DEFAULT_PATTERNS: Final = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")
"""llama.cpp's rule for a file that names none: punctuation, GPT-2's pieces, digits, and three digits at a time."""
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How a byte-level tokenizer splits text before merging."""

    patterns: tuple[str, ...] = ()
    """Split by these patterns, one after the other; empty = GPT-2's own pattern."""
    single_digits: bool = False
    nfc: bool = False
    """Normalise to NFC first."""
    whole_words: bool = False
    """A piece that is in the vocabulary is taken whole, without merging."""
    adds_bos: bool = False
    """Whether a text starts with the bos token if the file does not say."""


_LLAMA3: Final = _PreTokenizer((_LLAMA3_PATTERN,), whole_words=True, adds_bos=True)
_QWEN2: Final = _PreTokenizer((_QWEN2_PATTERN,), nfc=True)
PRE_TOKENIZERS: Final = {
    "default": _PreTokenizer(_DEFAULT_PATTERNS),
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _PreTokenizer((_TEKKEN_PATTERN,), whole_words=True, adds_bos=True),
}
"""By `tokenizer.ggml.pre`. The rules are those of the models' own tokenizer.json files; `default` is llama.cpp's."""


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that the metadata describe."""
    family = metadata.get("tokenizer.ggml.model")
    if family == "gpt2":
        tokenizer = _byte_level(metadata)
    elif family == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise CheckpointError(f'tokenizer.ggml.model is "{family}"; supported are gpt2 and llama')
    _add_marked_tokens(tokenizer, metadata)
    _add_template(tokenizer, metadata, default_bos=_adds_bos(metadata))
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json, without the chat template."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := special_id(metadata, key)) is not None:
            config[f"{name}_token"] = tokens[token]
    return config


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json to the folder."""
    (folder / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=False), encoding="utf-8")


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """Return the value for a file without `tokenizer.ggml.add_bos_token`."""
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    pre = metadata.get("tokenizer.ggml.pre", "default")
    return pre in PRE_TOKENIZERS and PRE_TOKENIZERS[pre].adds_bos


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError('"tokenizer.ggml.tokens" is missing in the file\'s metadata; convert the model again')
    return {token: index for index, token in enumerate(tokens)}


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f'tokenizer.ggml.pre is "{name}"; supported are {supported}')
    rule = PRE_TOKENIZERS[name]
    merges = [_halves(merge) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(_bpe(_vocabulary(metadata), merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splitters(rule))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _halves(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **options)
    except Exception as exc:  # the only class that the library raises
        raise CheckpointError(f"the file's tokenizer is inconsistent: {exc}; convert the model again") from exc


def _splitters(rule: _PreTokenizer) -> list[Any]:
    splitters: list[Any] = []
    if rule.single_digits:
        splitters.append(pre_tokenizers.Digits(individual_digits=True))
    splitters += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    splitters.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.patterns))
    return splitters


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    unknown = special_id(metadata, "unknown")
    merges = _merges_by_score(vocabulary, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(
        _bpe(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace: list[Any] = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *replace] if prefix else replace)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every way to make a token of two others, best score first; ties by the order of the halves.

    SentencePiece keeps no list of merges: it joins the pair whose result has the highest score.
    """
    merges = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    return [merge[3] for merge in merges]


def _add_marked_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """Control tokens are special; user-defined ones are matched in text but stay visible."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    control_numbers = control_ids(metadata)
    control = [token for number, token in enumerate(tokens) if number in control_numbers]
    user = [
        token
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _USER_DEFINED and number not in control_numbers
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user])


def _add_template(tokenizer: Tokenizer, metadata: dict[str, Any], *, default_bos: bool) -> None:
    """Add bos before and eos after a text, if the metadata ask for it."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    template, special = "$A", []
    bos, eos = special_id(metadata, "bos"), special_id(metadata, "eos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default_bos):
        template, special = f"{tokens[bos]} {template}", [(tokens[bos], bos)]
    if eos is not None and metadata.get("tokenizer.ggml.add_eos_token", False):
        template, special = f"{template} {tokens[eos]}", [*special, (tokens[eos], eos)]
    byte_level = [processors.ByteLevel(trim_offsets=False)] if metadata.get("tokenizer.ggml.model") == "gpt2" else []
    if special:
        byte_level.append(processors.TemplateProcessing(single=template, special_tokens=special))
    if byte_level:
        tokenizer.post_processor = processors.Sequence(byte_level)
