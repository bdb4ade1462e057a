"""The sizes in the metadata, and the tensors that they imply: exactly one of the right shape for every parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .header import Unread, is_int, quoted
from .keys import SAME_AS_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .header import Header, Verdict

MAX_LAYERS: Final = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""
ROPE_FREQS: Final = "rope_freqs.weight"
"""Llama 3's frequency factors: configuration that is kept as a tensor."""
NO_WEIGHTS: Final = dict.fromkeys(("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"), "holds no weights") | {
    "Q1_0": "the gguf package cannot decode"
}
"""Types that are not weights or hold only intermediate results, and one that cannot be read, each with the reason."""
TIED: Final = frozenset({"gemma2", "gemma3"})
"""Architectures whose model in SGLang always computes the output with the embedding: it skips `lm_head.weight`."""
WHOLE_HEADS: Final = frozenset({"llama", "gemma2", "gemma3"})
"""Architectures whose configuration in transformers wants a width that is a multiple of the number of heads."""
_FLOATS: Final = frozenset({"F32", "F16", "BF16"})
_EXPERTS: Final = re.compile(r"_exps\.|ffn_gate_inp|_shexp\.")
_VISION: Final = re.compile(r"^(v|mm|a)\.|vision|^multi_modal")
_LONGROPE: Final = re.compile(r"rope_factors_(long|short)")


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of a model."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int | None
    """Number of tokens; None if the file lists none."""


class Wanted(NamedTuple):
    """A tensor that an architecture has."""

    name: str
    shape: tuple[int | None, ...]
    """None means any size (the vocabulary of a file that lists none)."""
    required: bool = True


def one_for_all(value: Any) -> int | None:
    """The number for every layer, given once or per layer; None if layers differ or it is not a number."""
    values = value if isinstance(value, list) else [value]
    return values[0] if values and all(map(is_int, values)) and len(set(values)) == 1 else None


def read_dimensions(header: Header, architecture: str, verdict: Verdict) -> Dimensions | None:
    """Read the sizes; None, with reasons, if one is missing or impossible."""
    before = len(verdict.refusals)
    reader = _Reader(header, architecture, verdict)
    layers = reader.required("block_count", MAX_LAYERS)
    hidden, context = reader.required("embedding_length"), reader.required("context_length")
    feed_forward = reader.per_layer("feed_forward_length", layers)
    heads = reader.per_layer("attention.head_count", layers)
    kv_heads = reader.per_layer("attention.head_count_kv", layers, default=heads)
    head_dim = reader.optional("attention.key_length", default=hidden // heads if hidden and heads else None)
    if header.number(f"{architecture}.attention.layer_norm_rms_epsilon") is None:
        reader.missing("attention.layer_norm_rms_epsilon")
    if not (layers and hidden and context and feed_forward and heads and kv_heads and head_dim):
        if len(verdict.refusals) == before:
            verdict.refuse(f"the sizes of architecture {architecture} are incomplete; convert the model again")
        return None
    reader.check_heads(hidden, heads, kv_heads, head_dim)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list | Unread) else None
    return Dimensions(layers, hidden, feed_forward, heads, kv_heads, head_dim, vocabulary)


def wanted_tensors(architecture: str, sizes: Dimensions, *, biased: bool) -> Iterator[Wanted]:
    """Every tensor of an architecture: those of llama.cpp's load_tensors for which SGLang's model has a parameter.

    biased: whether the file has attention biases in an architecture where they are optional.
    """
    hidden, rows = sizes.hidden, {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    yield Wanted("token_embd.weight", (sizes.vocabulary, hidden))
    yield Wanted("output_norm.weight", (hidden,))
    if architecture not in TIED:
        yield Wanted("output.weight", (sizes.vocabulary, hidden), required=False)
    if architecture == "llama":
        yield Wanted(ROPE_FREQS, (sizes.head_dim // 2,), required=False)
    norms = {"attn_norm": hidden, "ffn_norm": hidden} | _further_norms(architecture, sizes)
    for layer in range(sizes.layers):
        block = f"blk.{layer}."
        for name, width in norms.items():
            yield Wanted(f"{block}{name}.weight", (width,))
        for name, heads in rows.items():
            yield Wanted(f"{block}attn_{name}.weight", (heads * sizes.head_dim, hidden))
        yield Wanted(f"{block}attn_output.weight", (hidden, sizes.heads * sizes.head_dim))
        for name in ("gate", "up"):
            yield Wanted(f"{block}ffn_{name}.weight", (sizes.feed_forward, hidden))
        yield Wanted(f"{block}ffn_down.weight", (hidden, sizes.feed_forward))
        if architecture == "qwen2" or biased:
            for name, heads in rows.items():
                yield Wanted(f"{block}attn_{name}.bias", (heads * sizes.head_dim,))
        if biased:
            # SGLang's Llama has a bias on all four projections or on none.
            yield Wanted(f"{block}attn_output.bias", (hidden,))


def check_tensors(header: Header, architecture: str, sizes: Dimensions, verdict: Verdict) -> None:
    """Refuse tensors that are missing, have an unsupported shape or type, or belong to no parameter."""
    biased = architecture == "llama" and "blk.0.attn_q.bias" in header.tensors
    wanted = {each.name: each for each in wanted_tensors(architecture, sizes, biased=biased)}
    missing = [name for name, each in wanted.items() if each.required and name not in header.tensors]
    left = [name for name in header.tensors if name not in wanted]
    if left:
        verdict.refuse(_left_over(left, architecture))
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        verdict.refuse(
            f'tensor "{missing[0]}"{more} missing of the {len(wanted)} that architecture {architecture} has; '
            "copy or download the file again, or convert the model again"
        )
    if architecture not in TIED and "output.weight" not in header.tensors:
        verdict.default("output.weight", "token_embd.weight")
    for name, each in wanted.items():
        if name in header.tensors:
            _check_tensor(header, each, verdict)


def _check_tensor(header: Header, wanted: Wanted, verdict: Verdict) -> None:
    name, (kind, shape) = wanted.name, header.tensors[wanted.name]
    fits = len(shape) == len(wanted.shape) and all(
        size in (found, None) for size, found in zip(wanted.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in wanted.shape)
        verdict.refuse(f'tensor "{name}" has shape {list(shape)}, must be [{expected}] by the metadata')
    if kind in NO_WEIGHTS:
        verdict.refuse(f'tensor "{name}" of shape {list(shape)} has type {kind}, which {NO_WEIGHTS[kind]}')
    elif name == ROPE_FREQS and kind != "F32":
        verdict.refuse(f'tensor "{name}" has type {kind}, must be F32')
    elif len(shape) == 1 and kind not in _FLOATS:
        verdict.refuse(f'tensor "{name}" has type {kind}, must be one of: {", ".join(sorted(_FLOATS))}')


def _left_over(names: list[str], architecture: str) -> str:
    name = next((name for name in names if _EXPERTS.search(name) or _VISION.search(name)), names[0])
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    if _EXPERTS.search(name):
        why = "it is of a mixture of experts, which SGLang does not serve under this architecture"
    elif _VISION.search(name):
        why = "it is of the vision part, which is not served from one file"
    elif _LONGROPE.search(name):
        why = "longrope is not supported"
    else:
        why = "this variant of it is not supported"
    return f"tensor {quoted(name)}{more} is not part of architecture {architecture}: {why}"


def _further_norms(architecture: str, sizes: Dimensions) -> dict[str, int]:
    norms: dict[str, int] = {}
    if architecture in ("qwen3", "gemma3"):
        norms |= {"attn_q_norm": sizes.head_dim, "attn_k_norm": sizes.head_dim}
    if architecture in ("gemma2", "gemma3"):
        norms |= {"post_attention_norm": sizes.hidden, "post_ffw_norm": sizes.hidden}
    return norms


class _Reader:
    """Reads sizes and notes what is wrong with them. Values of the wrong type are left to `check_keys`."""

    def __init__(self, header: Header, architecture: str, verdict: Verdict) -> None:
        self._metadata, self._architecture, self._verdict = header.metadata, architecture, verdict

    def full(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def missing(self, key: str) -> None:
        if self.full(key) not in self._metadata:
            self._verdict.refuse(f'metadata key "{self.full(key)}" is missing; convert the model again')

    def required(self, key: str, maximum: int = 2**31 - 1) -> int | None:
        self.missing(key)
        return self._in_range(key, self._metadata.get(self.full(key)), maximum)

    def optional(self, key: str, default: int | None) -> int | None:
        # A default is not noted here: the shapes of the tensors show whether it is right.
        return self.required(key) if self.full(key) in self._metadata else default

    def per_layer(self, key: str, layers: int | None, default: int | None = None) -> int | None:
        value = self._metadata.get(self.full(key))
        if not isinstance(value, list):
            return self.optional(key, default) if default is not None else self.required(key)
        number = one_for_all(value)
        if layers is not None and len(value) != layers:
            self._verdict.refuse(
                f'"{self.full(key)}" has {len(value)} elements, must have one for each of {layers} layers'
            )
            return None
        if number is None:
            found = " and ".join(map(str, sorted(set(map(str, value)))[:3]))
            self._verdict.refuse(
                f'"{self.full(key)}" differs between layers ({found}); SGLang serves one number in all of them'
            )
            return None
        return self._in_range(key, number, 2**31 - 1)

    def check_heads(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        if self._architecture in WHOLE_HEADS and hidden % heads:
            self._verdict.refuse(
                f'"{self.full("embedding_length")}" is {hidden}, must be a multiple of the {heads} heads: transformers '
                f"accepts no other configuration of {self._architecture}"
            )
        if heads % kv_heads:
            self._verdict.refuse(
                f'"{self.full("attention.head_count")}" is {heads}, must be a multiple of the {kv_heads} KV heads'
            )
        if head_dim % 2:
            self._verdict.refuse(f'"{self.full("attention.key_length")}" is {head_dim}, must be even to be rotated')
        for key in SAME_AS_HEAD:
            value = self._metadata.get(self.full(key))
            if is_int(value) and value != head_dim:
                self._verdict.refuse(f'"{self.full(key)}" is {value}, must be {head_dim}, the size of a head')

    def _in_range(self, key: str, value: object, maximum: int) -> int | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        if not 1 <= value <= maximum:
            self._verdict.refuse(f'"{self.full(key)}" must be between 1 and {maximum}, got {value}')
            return None
        return value
