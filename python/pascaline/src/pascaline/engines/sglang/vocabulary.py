"""The vocabulary of a GGUF file, token by token: what a reader of headers leaves unread because it is large.

A file on this machine is read, in tenths of a second; of one elsewhere the header alone is known.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_acceptance import Header, Unread, Verdict
from gguf_acceptance.keys import check_common_keys
from gguf_acceptance.vocabulary import PREFIX, check_vocabulary

from pascaline.errors import ModelError
from pascaline.models.gguf import open_gguf

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec


def vocabulary_refusals(spec: ModelSpec) -> tuple[str, ...]:
    """Return what is wrong with the tokens and merges themselves; nothing for a file that cannot be read here."""
    unread = any(isinstance(value, Unread) for key, value in spec.metadata.items() if key.startswith(PREFIX))
    if spec.format != "gguf" or not unread or not isinstance(spec.files[0], Path):
        return ()
    try:
        state = spec.files[0].stat()
        return _refusals((spec.files[0], state.st_size, state.st_mtime_ns))
    except OSError:
        return ()
    except ModelError as error:
        return (str(error),)


@functools.lru_cache(maxsize=4)
def _refusals(state: tuple[Path, int, int]) -> tuple[str, ...]:
    """state: path, size and time of change, so that a changed file is read again."""
    with open_gguf(state[0]) as header:
        values = {key: header.metadata.value(key) for key in header.metadata if key.startswith(PREFIX)}
    verdict = Verdict()
    check_common_keys(values, verdict)
    check_vocabulary(Header(values, {}), verdict)
    return tuple(verdict.refusals)
