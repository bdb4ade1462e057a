"""Parses and formats sizes and durations as people write them: "64 MiB", "5m"."""

from __future__ import annotations

import re

BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
SECOND_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def _schema(number: str, units: dict[str, int] | dict[str, float]) -> dict[str, object]:
    """Return the JSON schema of a number, or of a text with one of the units in any case."""
    letters = ("".join(f"[{letter.upper()}{letter}]" for letter in unit) for unit in units if unit)
    pattern = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(letters)})?\s*$"
    return {"anyOf": [{"type": number, "minimum": 0}, {"type": "string", "pattern": pattern}]}


BYTES_SCHEMA = _schema("integer", BYTE_UNITS)
SECONDS_SCHEMA = _schema("number", SECOND_UNITS)


def parse_bytes(value: object) -> object:
    """Return bytes from a number or a text such as "64 MiB"; anything else unchanged, for the type check to refuse."""
    quantity = _parse(value, BYTE_UNITS, "KiB, MiB, GiB, kB, MB, GB or none for bytes")
    return round(quantity) if isinstance(quantity, float) else quantity


def parse_seconds(value: object) -> object:
    """Return seconds from a number or a text such as "5m"; anything else unchanged, for the type check to refuse."""
    return _parse(value, SECOND_UNITS, "ms, s, m, h or none for seconds")


def _parse(value: object, units: dict[str, int] | dict[str, float], known: str) -> object:
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None:
        return value
    number, unit = match.groups()
    if unit.lower() not in units:
        raise ValueError(f"unknown unit {unit!r}, must be {known}")
    return float(number) * units[unit.lower()]


def format_bytes(count: float) -> str:
    """Return a size in the largest binary unit in which it is at least 1, with two decimals."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
