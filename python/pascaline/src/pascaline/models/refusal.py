"""How readers of untrusted files refuse one, and how they show names that come from it."""

from __future__ import annotations

from typing import NoReturn

from pascaline.errors import ModelError

MOST_SHOWN = 80
"""Characters, or bytes, of a name that a message shows."""


def refuse(name: str, cause: str) -> NoReturn:
    """Raise ModelError. name: the file, as messages call it."""
    raise ModelError(f"failed to read {name}: {cause}")


def shown(text: str) -> str:
    """Return a name from a file as messages show it: quoted, escaped, and cut if it is long."""
    return ascii(text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "...")


def printable(text: str) -> str:
    """Return a name from a file as tables and pictures show it: control characters are replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
