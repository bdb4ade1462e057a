"""What each kind of tokenizer needs, from the keys of `tokenizer.ggml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .header import Unread, is_int

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .header import Header, Verdict

PREFIX: Final = "tokenizer.ggml."
FAMILIES: Final = ("gpt2", "llama")
"""Values of `tokenizer.ggml.model`: byte-level BPE, and SentencePiece BPE."""
PRE_TOKENIZERS: Final = (
    "default",
    "gpt-2",
    "smollm",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "qwen2",
    "deepseek-r1-qwen",
    "tekken",
)
"""Values of `tokenizer.ggml.pre` whose rule is known."""
_UNKNOWN: Final = 2
_CONTROL: Final = 3
"""Values of `tokenizer.ggml.token_type`: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
UNSET_ID: Final = 0xFFFFFFFF
"""-1 as converters store it: the model has no such token."""
SPECIAL: Final = ("bos", "eos", "eot", "eom", "unknown", "padding")
SENTENCEPIECE_IDS: Final = {"bos": 1, "eos": 2, "unknown": 0}
"""llama.cpp's default ids for a SentencePiece vocabulary."""
END_TEXTS: Final = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
)
"""Texts of tokens that end a generation whatever the keys say, and are control tokens: llama.cpp's vocab.load."""
_FILL_END: Final = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens between the files of a text to be filled in, which end a generation too: by key, or by one of these texts."""


def special_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Id of a special token (`bos`, `eos`, …); None if the model has none. Not checked against the vocabulary."""
    value = metadata.get(f"{PREFIX}{name}_token_id")
    if value is None and metadata.get(f"{PREFIX}model") == "llama":
        return SENTENCEPIECE_IDS.get(name)
    return value if is_int(value) and value not in (UNSET_ID, -1) else None


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a generation, lowest first: from the file's keys (eos, eot, eom, a list), and by their texts."""
    found = [special_id(metadata, name) for name in ("eos", "eot", "eom")]
    listed = metadata.get(f"{PREFIX}eos_token_ids")
    found += [each for each in listed if is_int(each)] if isinstance(listed, list) else []
    found += [*_end_texts(metadata), *_fill_ends(metadata)]
    return sorted({each for each in found if each is not None})


def control_ids(metadata: Mapping[str, Any]) -> set[int]:
    """Return the control tokens, which texts do not show: those of that type, and those that end a generation.

    The unknown token is among them, as in llama.cpp.
    """
    kinds = metadata.get(f"{PREFIX}token_type")
    found = (
        {number for number, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)}
        if isinstance(kinds, list)
        else set()
    )
    return found | {number for number in (*_end_texts(metadata), *_fill_ends(metadata)) if number is not None}


def _end_texts(metadata: Mapping[str, Any]) -> Iterator[int]:
    by_text = ids_by_text(metadata)
    within = {"</s>"} if "<|tool_response>" in by_text else set()
    if by_text.keys() & {"<|call|>", "<|calls|>"} and by_text.keys() & {"<|return|>", "<|flush|>"}:
        within.add("<|end|>")  # it ends a channel there, not the turn
    for text in END_TEXTS:
        if text in by_text and text not in within:
            yield by_text[text]


def _fill_ends(metadata: Mapping[str, Any]) -> Iterator[int | None]:
    by_text = ids_by_text(metadata)
    for name, texts in _FILL_END.items():
        found = special_id(metadata, name)
        yield next((by_text[text] for text in texts if text in by_text), None) if found is None else found


def ids_by_text(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id; empty if the tokens were not read."""
    tokens = metadata.get(f"{PREFIX}tokens")
    return {token: number for number, token in enumerate(tokens)} if isinstance(tokens, list) else {}


def check_vocabulary(header: Header, verdict: Verdict) -> None:
    """Refuse a tokenizer that lacks what its kind needs."""
    metadata = header.metadata
    tokens, family = metadata.get(f"{PREFIX}tokens"), header.text(f"{PREFIX}model")
    if not isinstance(tokens, list | Unread) or not len(tokens):
        verdict.refuse("tokenizer.ggml.tokens is missing: the file has no vocabulary; convert the model again")
        return
    if family not in FAMILIES:
        verdict.refuse(f"tokenizer.ggml.model is {family!r}, must be one of: {', '.join(FAMILIES)}")
        return
    if family == "gpt2":
        _check_byte_level(header, verdict)
    elif f"{PREFIX}scores" not in metadata:
        verdict.refuse(
            "tokenizer.ggml.scores is missing, which a SentencePiece vocabulary needs; convert the model again"
        )
    _check_twice(tokens, verdict)
    _check_lengths(metadata, len(tokens), verdict)
    _check_ids(metadata, len(tokens), verdict)
    _note_defaults(metadata, family, verdict)


def _check_byte_level(header: Header, verdict: Verdict) -> None:
    pre, merges = header.metadata.get(f"{PREFIX}pre", "default"), header.metadata.get(f"{PREFIX}merges")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        named = f'"{pre}", an unknown pre-tokenizer' if isinstance(pre, str) else "no short string"
        verdict.refuse(f"tokenizer.ggml.pre is {named}; supported are {', '.join(PRE_TOKENIZERS)}")
    if merges is None or (isinstance(merges, list | Unread) and not len(merges)):
        verdict.refuse(
            f"tokenizer.ggml.merges is {'missing' if merges is None else 'empty'}, so every text would be cut into "
            "single bytes; convert the model again with its tokenizer"
        )
    if isinstance(merges, list):
        _check_merges(header.metadata, merges, verdict)


def _check_merges(metadata: Mapping[str, Any], merges: list[Any], verdict: Verdict) -> None:
    """Check that each merge joins two tokens to a third."""
    tokens = metadata.get(f"{PREFIX}tokens")
    if not isinstance(tokens, list):
        return
    known = set(map(str, tokens))
    for place, merge in enumerate(merges):
        left, _, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not left or not right or not {left, right, left + right} <= known:
            verdict.refuse(
                f"tokenizer.ggml.merges[{place}] is {merge!a}, must be two tokens whose joining is a token; "
                "convert the model again"
            )
            return


def _check_twice(tokens: list[Any] | Unread, verdict: Verdict) -> None:
    """Refuse two tokens of the same text, as llama.cpp does: no text could be cut into the first of them."""
    first: dict[str, int] = {}
    for number, token in enumerate(tokens if isinstance(tokens, list) else ()):
        if isinstance(token, str) and first.setdefault(token, number) != number:
            verdict.refuse(
                f"tokenizer.ggml.tokens[{number}] is {token!a}, which is token {first[token]} too; "
                "convert the model again"
            )
            return


def _check_lengths(metadata: Mapping[str, Any], tokens: int, verdict: Verdict) -> None:
    for name in ("scores", "token_type"):
        values = metadata.get(f"{PREFIX}{name}")
        if isinstance(values, list | Unread) and len(values) != tokens:
            verdict.refuse(
                f"{PREFIX}{name} has {len(values)} elements, must have one for each of {tokens} tokens; "
                "convert the model again"
            )


def _check_ids(metadata: Mapping[str, Any], tokens: int, verdict: Verdict) -> None:
    found = {f"{PREFIX}{name}_token_id": special_id(metadata, name) for name in SPECIAL}
    listed = metadata.get(f"{PREFIX}eos_token_ids")
    ids = [*found.items(), *((f"{PREFIX}eos_token_ids", each) for each in (listed if isinstance(listed, list) else ()))]
    for key, value in ids:
        if is_int(value) and value is not None and not 0 <= value < tokens:
            verdict.refuse(f"{key} is {value}, must be between 0 and {tokens - 1} (the tokens), or absent")


def _note_defaults(metadata: Mapping[str, Any], family: str, verdict: Verdict) -> None:
    """Note the defaults of llama.cpp's vocab.load for absent keys."""
    absent = {
        name for name in ("token_type", "pre", "add_bos_token", "add_eos_token") if f"{PREFIX}{name}" not in metadata
    }
    if "token_type" in absent:
        verdict.default(f"{PREFIX}token_type", "normal for all, so no token is a control token")
    if family == "gpt2" and "pre" in absent:
        verdict.default(f"{PREFIX}pre", "default")
    if "add_bos_token" in absent:
        verdict.default(f"{PREFIX}add_bos_token", "by the kind of tokenizer")
    if "add_eos_token" in absent:
        verdict.default(f"{PREFIX}add_eos_token", "false")
    if family == "llama" and f"{PREFIX}add_space_prefix" not in metadata:
        verdict.default(f"{PREFIX}add_space_prefix", "true")
    for name, number in SENTENCEPIECE_IDS.items() if family == "llama" else ():
        if f"{PREFIX}{name}_token_id" not in metadata:
            verdict.default(f"{PREFIX}{name}_token_id", number)
    if family == "gpt2" and f"{PREFIX}eos_token_id" not in metadata:
        verdict.default(f"{PREFIX}eos_token_id", "none, so an answer ends at other end tokens or at max_tokens")


def difference(model: Mapping[str, Any], draft: Mapping[str, Any]) -> str | None:
    """Return in which way a draft model's tokenizer is another than the model's; None if a number means the same text.

    Both: keys of the files with the tokens themselves. Tokens that end an answer may differ: only the model's end it.
    """
    families = [each.get(f"{PREFIX}model") for each in (model, draft)]
    if families[0] != families[1]:
        return f"tokenizer.ggml.model is {families[1]!r}, the model's is {families[0]!r}"
    theirs, ours = (each.get(f"{PREFIX}tokens") for each in (model, draft))
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return "tokenizer.ggml.tokens cannot be read"
    if len(theirs) != len(ours):
        return f"it has {len(ours):,} tokens, the model has {len(theirs):,}"
    for number, (theirs_text, our_text) in enumerate(zip(theirs, ours, strict=True)):
        if theirs_text != our_text:
            return f"token {number} is {our_text!r}, the model's is {theirs_text!r}"
    return None
