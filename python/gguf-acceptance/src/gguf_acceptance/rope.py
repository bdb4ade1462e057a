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
    from collections.abc import Iterator, Mapping, Sequence

    from .header import Header, Verdict

DEFAULT_BASE: Final = 10000.0
"""llama.cpp's base of the rotation if the file names none, for sliding layers too."""
YARN_ONLY: Final = ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_ext_factor")
"""Keys of rope.scaling that only YaRN uses."""
UNSCALED: Final = frozenset({"gemma2"})
"""Architectures whose model in SGLang does not scale positions."""


LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The same in every Llama 3.1, 3.2 and 3.3 (Meta's config.json); only `factor` differs, 8 or 32."""
_FACTOR_TOLERANCE: Final = 1e-3
"""Relative; converters compute in 32 bits."""


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


def check_factors(factors: Sequence[float], name: str = ROPE_FREQS) -> None:
    """Raise RopeError for a frequency factor by which nothing can be divided; name: of the tensor that holds them."""
    for place, factor in enumerate(factors):
        if not (math.isfinite(factor) and factor > 0):
            raise RopeError(
                f'tensor "{name}" has the value {factor:g} at place {place}, must be a finite number above 0; '
                "copy or download the file again, or convert the model again"
            )


def llama3_factors(head_dim: int, theta: float, factor: float) -> list[float]:
    """Return what `rope_freqs` of a Llama 3.x model holds, by the rule of transformers' `rope_type` "llama3"."""
    return [_llama3_factor(theta ** (at / head_dim) * 2 * math.pi, factor) for at in range(0, head_dim, 2)]


def _llama3_factor(wavelength: float, factor: float) -> float:
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] / wavelength
    if turns > high:
        return 1.0
    smooth = (turns - low) / (high - low)
    return factor if turns < low else 1.0 / ((1.0 - smooth) / factor + smooth)


def llama3_scaling(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """Return the entries of `rope_parameters` that give these frequency factors. Raises RopeError for another rule."""
    check_factors(factors)
    factor = float(round(max(factors), 3))
    # The highest frequencies keep their speed, so the largest factor is never below 1.
    expected = llama3_factors(2 * len(factors), theta, max(factor, 1.0))
    if not all(math.isclose(*pair, rel_tol=_FACTOR_TOLERANCE) for pair in zip(factors, expected, strict=True)):
        raise RopeError(
            f'tensor "{ROPE_FREQS}" does not follow the Llama 3 rule (largest factor {factor}); '
            "this way of scaling positions is not supported"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


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
