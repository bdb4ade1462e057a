"""The vocabulary of a GGUF file, token by token: what a reader of headers leaves unread because it is large.

A file on this machine is read, in tenths of a second; of one elsewhere the header alone is known.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_acceptance import Header, Unread, Verdict
from gguf_acceptance.keys import check_common_keys
from gguf_acceptance.vocabulary import PREFIX, check_vocabulary, difference

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
        return _refusals(_state(spec.files[0]))
    except OSError:
        return ()
    except ModelError as error:
        return (str(error),)


def tokenizer_difference(model: ModelSpec, draft: ModelSpec) -> str | None:
    """Return in which way the tokenizer of a draft model's file is another than that of the model's; None if in none.

    If one of the files is not on this machine, only the numbers of tokens are compared.
    """
    if not (isinstance(model.files[0], Path) and isinstance(draft.files[0], Path)):
        if model.vocab_size == draft.vocab_size:
            return None
        return f"it has {draft.vocab_size:,} tokens, the model has {model.vocab_size:,}"
    return _difference(*(_state(path) for path in (model.files[0], draft.files[0])))


@functools.lru_cache(maxsize=4)
def _difference(model: tuple[Path, int, int], draft: tuple[Path, int, int]) -> str | None:
    return difference(_values(model[0]), _values(draft[0]))


def _state(path: Path) -> tuple[Path, int, int]:
    """Return path, size and time of change, so that a changed file is read again."""
    state = path.stat()
    return path, state.st_size, state.st_mtime_ns


def _values(path: Path) -> dict[str, Any]:
    """Return the keys of the tokenizer with their lists."""
    with open_gguf(path) as header:
        return {key: header.metadata.value(key) for key in header.metadata if key.startswith(PREFIX)}


@functools.lru_cache(maxsize=4)
def _refusals(state: tuple[Path, int, int]) -> tuple[str, ...]:
    values = _values(state[0])
    verdict = Verdict()
    check_common_keys(values, verdict)
    check_vocabulary(Header(values, {}), verdict)
    return tuple(verdict.refusals)
