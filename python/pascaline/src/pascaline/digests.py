"""Checksums of models: one sha256 for each file, in file order, written as a list or as text with commas."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

SHA256_WORDS = "64 hexadecimal digits; for a split model, 64 for each of its parts, in order"
SHA256_SCHEMA = {
    "anyOf": [
        {"type": "string", "pattern": "^[0-9a-fA-F]{64}(,[0-9a-fA-F]{64})*$"},
        {"type": "array", "items": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}, "minItems": 1},
        {"type": "null"},
    ]
}
"""JSON schema of the values that `parse_sha256s` accepts."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def parse_sha256s(value: Any) -> tuple[str, ...] | None:
    """Return the digests of a list, or of a text with commas between them, in lower case; None stays None.

    Raises ValueError for anything else.
    """
    if value is None:
        return None
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"invalid value {value!r}, must be {SHA256_WORDS}")
    for text in texts:
        if not isinstance(text, str) or not _SHA256.fullmatch(text):
            raise ValueError(f"invalid value {text!r}, must be {SHA256_WORDS}")
    return tuple(text.lower() for text in texts)


def shown_sha256s(digests: Sequence[str]) -> str:
    """Return digests as messages show them."""
    return ", ".join(digests)
