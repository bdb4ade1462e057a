"""JSON from untrusted files: limited in size, containers and depth, and without duplicate keys."""

from __future__ import annotations

import json
from typing import NoReturn

from pascaline.models.refusal import refuse

MAX_JSON_BYTES = 32 << 20
"""Largest config.json, index or safetensors header that is read; the index of a model of 92,000 tensors has 9 MiB."""
MAX_CONTAINERS = 1 << 20
"""Most objects and lists in one file: each costs far more memory than the two bytes it is written with."""


def parse_object(name: str, data: bytes) -> dict[str, object]:
    """The JSON object in `data`; `name` is what messages call it."""
    containers = data.count(b"{") + data.count(b"[")
    if len(data) > MAX_JSON_BYTES or containers > MAX_CONTAINERS:
        refuse(
            name,
            f"it has {len(data)} bytes and {containers} objects and lists, at most {MAX_JSON_BYTES} and "
            f"{MAX_CONTAINERS} are read",
        )
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        refuse(name, "its JSON is nested too deep")
    except UnicodeDecodeError as error:
        refuse(name, f"it is not UTF-8 at byte {error.start}")
    except ValueError as error:
        refuse(name, f"it is not sound JSON: {error}")
    if not isinstance(value, dict):
        refuse(name, "it is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"key {twice[:80]!a} is there twice")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
