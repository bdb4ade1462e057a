"""The scaling of positions: translates every spelling in GGUF files into the terms of config.json.

Rules: llama.cpp's load_hparams (a factor without a type is linear; the old key rope.scale_linear replaces a
missing rope.scaling.factor; a factor of 0 means no scaling) and llama-context (YaRN's magnitude is
attn_factor x (1 + 0.1 ln factor)).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from .dimensions import ROPE_FREQS
from .header import is_int, is_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .header import Header, Verdict

DEFAULT_BASE: Final = 10000.0
"""llama.cpp's base of the rotation if the file names none, for sliding layers too."""
YARN_ONLY: Final = ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor")
"""Keys of rope.scaling that only YaRN uses."""
UNSCALED: Final = frozenset({"gemma2"})
"""Architectures whose model in SGLang does not scale positions."""


class RopeError(ValueError):
    """Positions cannot be scaled as the file says; the message names the key."""


def rope_scaling(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Entries of `rope_parameters` other than `rope_theta`. Raises RopeError if SGLang cannot do what the file says."""
    keys = _Keys(metadata, architecture)
    kind = keys.text("rope.scaling.type")
    factor = keys.number("rope.scaling.factor")
    if factor is None:
        factor = keys.number("rope.scale_linear")
    if kind is None:
        kind = "linear"
        keys.refuse_beside("rope.scaling.original_context_length", "a missing rope.scaling.type")
    if kind not in ("none", "linear", "yarn"):
        raise RopeError(
            f'"{keys.full("rope.scaling.type")}" is "{kind}", which is not supported; supported are none, linear, yarn '
            "and llama3 (by its tensor rope_freqs)"
        )
    scaling = _yarn(keys, factor) if kind == "yarn" else _plain(keys, kind, factor)
    if scaling["rope_type"] != "default" and architecture in UNSCALED:
        raise RopeError(
            f'"{keys.full("rope.scaling.factor")}" is {factor:g}: SGLang scales no positions of {architecture}'
        )
    return scaling


def check_rope(header: Header, architecture: str, verdict: Verdict) -> None:
    """Refuse a scaling that SGLang does not support, and note a base that the file leaves out."""
    for key in ("rope.freq_base", *(["rope.freq_base_swa"] if architecture == "gemma3" else [])):
        base = header.number(f"{architecture}.{key}")
        if f"{architecture}.{key}" not in header.metadata:
            verdict.default(f"{architecture}.{key}", f"{DEFAULT_BASE:g}")
        elif base is not None and base <= 0:
            verdict.refuse(f'"{architecture}.{key}" is {base:g}, must be above 0')
    try:
        scaling = rope_scaling(header.metadata, architecture)
    except RopeError as error:
        verdict.refuse(str(error))
        return
    for key, value in _defaults(header, architecture, scaling):
        if f"{architecture}.rope.scaling.{key}" not in header.metadata:
            verdict.default(f"{architecture}.rope.scaling.{key}", value)
    if ROPE_FREQS in header.tensors and scaling["rope_type"] != "default":
        verdict.refuse(
            f'tensor "{ROPE_FREQS}" stands beside "{architecture}.rope.scaling.factor": two ways of scaling positions '
            "in one file are not supported"
        )


def _defaults(header: Header, architecture: str, scaling: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """llama.cpp's defaults for the keys of a scaling that a file may leave out: (key of rope.scaling, value)."""
    if scaling["rope_type"] == "linear":
        yield "type", "linear"
    if scaling["rope_type"] == "yarn":
        yield "original_context_length", scaling["original_max_position_embeddings"]
        yield from (("attn_factor", 1), ("yarn_beta_fast", 32), ("yarn_beta_slow", 1))
    kind = header.text(f"{architecture}.rope.scaling.type")
    if scaling["rope_type"] == "default" and kind not in (None, "", "none"):
        yield "factor", 1


def _plain(keys: _Keys, kind: str, factor: float | None) -> dict[str, Any]:
    """No scaling, or the same for all frequencies."""
    for key in YARN_ONLY:
        keys.refuse_beside(f"rope.scaling.{key}", f"rope.scaling.type {kind}")
    attention = keys.number("rope.scaling.attn_factor")
    if attention not in (None, 1.0):
        raise RopeError(
            f'"{keys.full("rope.scaling.attn_factor")}" is {attention:g}: SGLang has a magnitude for yarn alone, '
            f"this is {kind}"
        )
    if kind == "none" or not factor or factor == 1.0:
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": _positive(keys, "rope.scaling.factor", factor)}


def _yarn(keys: _Keys, factor: float | None) -> dict[str, Any]:
    if not factor:
        raise RopeError(f'"{keys.full("rope.scaling.factor")}" is missing, which yarn needs; convert the model again')
    if (share := keys.number("rope.scaling.yarn_ext_factor")) is not None and 0 <= share != 1.0:
        raise RopeError(f'"{keys.full("rope.scaling.yarn_ext_factor")}" is {share:g}, SGLang computes 1 alone')
    original = keys.whole("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": _positive(keys, "rope.scaling.factor", factor),
        "original_max_position_embeddings": original or keys.whole("context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if (beta := keys.number(f"rope.scaling.yarn_{name}")) is not None:
            scaling[name] = _positive(keys, f"rope.scaling.yarn_{name}", beta)
    return scaling | _magnitude(keys, factor)


def _magnitude(keys: _Keys, factor: float) -> dict[str, Any]:
    """The file's factor of YaRN's magnitude, as SGLang (attn_factor) and transformers (the whole) name it."""
    attention = keys.number("rope.scaling.attn_factor")
    if attention is None or attention == 1.0:
        return {}
    _positive(keys, "rope.scaling.attn_factor", attention)
    whole = attention * (1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0)
    return {"attn_factor": attention, "attention_factor": whole}


def _positive(keys: _Keys, key: str, value: float) -> float:
    if value <= 0:
        raise RopeError(f'"{keys.full(key)}" is {value:g}, must be above 0')
    return value


class _Keys:
    """Typed access; a value of the wrong type is a RopeError."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._architecture = metadata, architecture

    def full(self, key: str) -> str:
        return f"{self._architecture}.{key}"

    def number(self, key: str) -> float | None:
        value = self._metadata.get(self.full(key))
        if value is not None and not is_number(value):
            raise RopeError(f'"{self.full(key)}" is {value!r}, must be a finite number')
        return None if value is None else shortest(value)

    def whole(self, key: str) -> int | None:
        value = self._metadata.get(self.full(key))
        if value is not None and not (is_int(value) and value >= 0):
            raise RopeError(f'"{self.full(key)}" is {value!r}, must be a whole number')
        return value

    def text(self, key: str) -> str | None:
        value = self._metadata.get(self.full(key))
        if value is not None and not isinstance(value, str):
            raise RopeError(f'"{self.full(key)}" is {value!r}, must be a string')
        return value or None

    def refuse_beside(self, key: str, other: str) -> None:
        if self.full(key) in self._metadata:
            raise RopeError(f'"{self.full(key)}" contradicts {other}: it means something to yarn alone')


def shortest(value: float) -> float:
    """The decimal that a 32-bit float was made from: 9.999999747378752e-06 was 1e-05."""
    for digits in range(1, 17):
        short = float(f"{value:.{digits}g}")
        if math.isclose(short, value, rel_tol=3e-8):
            return short
    return float(value)
