"""The line of a key in a TOML text, for messages about its value.

No TOML reader here reports positions: tomllib drops the layout, and tomlkit has no positions in its API. But tomlkit
writes a document back as it was read, so the line of a key is the first one that differs once the key is removed.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def line_of_key(text: str, path: Sequence[str]) -> int | None:
    """Return the number of the line on which a key's value begins, from 1; of a table, the line of its first header.

    path: names of the tables and of the key. None: the text has no such key, or tomlkit cannot read it.
    """
    # Imported for a text with a key to find only: it takes 40 ms.
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    *groups, name = path
    try:
        document = tomlkit.parse(text)
        table: Any = document
        for group in groups:
            table = table[group]
        del table[name]
    except (TOMLKitError, KeyError, TypeError, RecursionError):
        return None
    pairs = itertools.zip_longest(text.splitlines(), tomlkit.dumps(document).splitlines())
    return next((number for number, (before, after) in enumerate(pairs, 1) if before != after), None)
