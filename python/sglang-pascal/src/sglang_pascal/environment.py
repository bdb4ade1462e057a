"""SGLang's getters of environment variables, which every decode step calls some thirty times."""

from __future__ import annotations

import os
from typing import Any, Final

_UNCHANGING: Final = (bool, int, float, str, tuple, type(None))
"""Types of values that nobody can change: the same object is given again."""
_NEVER: Final = object()


def keeps_bytes() -> bool:
    """Whether this Python's os.environ holds the variables as bytes, as CPython's does on Linux."""
    return isinstance(getattr(os.environ, "_data", None), dict) and hasattr(os.environ, "encodekey")


def parse_once() -> None:
    """Let `EnvField.get` look at a variable's bytes, and parse them only if they changed.

    os.getenv encodes the name and decodes the value each time, which takes several times as long.
    """
    from sglang.srt.environ import EnvField

    EnvField.get = parsing_once(EnvField.get)


def parses_once() -> bool:
    """Whether the getter is replaced."""
    from sglang.srt.environ import EnvField

    return getattr(EnvField.get, "__module__", None) == __name__


def parsing_once(original: Any) -> Any:
    """Return a getter that replaces the original one and calls it only if the variable changed."""

    def get(field: Any) -> Any:
        known = field.__dict__.get("_sglang_pascal")
        if known is not None:
            key, raw, value = known
            if os.environ._data.get(key) == raw and not field._set_to_none:  # type: ignore[attr-defined]
                return value
        return _first(original, field)

    get.__wrapped__ = original  # type: ignore[attr-defined]
    return get


def _first(original: Any, field: Any) -> Any:
    """Return the original getter's value, and keep it if it depends on the variable's bytes alone."""
    key = os.environ.encodekey(field.name)
    raw, value = os.environ._data.get(key), original(field)  # type: ignore[attr-defined]
    if not field._set_to_none and isinstance(value, _UNCHANGING) and value == _parsed(field, raw):
        field.__dict__["_sglang_pascal"] = key, raw, value
    return value


def _parsed(field: Any, raw: bytes | None) -> Any:
    """Return what the bytes say; nothing that equals a value if they cannot be parsed, or a function decides."""
    if raw is None:
        return _NEVER if callable(field.default) else field.default
    try:
        return field.parse(os.fsdecode(raw))
    except ValueError:
        return _NEVER
