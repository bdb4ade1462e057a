"""Checks that a draft model has the model's tokenizer: a token's number must mean the same text in both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf_acceptance.vocabulary import difference

from sglang_pascal.checkpoint.prepare import MANIFEST, open_prepared
from sglang_pascal.errors import PluginError

if TYPE_CHECKING:
    from pathlib import Path


def require_same_tokenizer(model: Path, draft: Path) -> None:
    """Raise PluginError with the first difference. A folder that was not prepared from a GGUF file is not compared."""
    if not all((folder / MANIFEST).is_file() for folder in (model, draft)):
        return
    found = difference(open_prepared(model).metadata, open_prepared(draft).metadata)
    if found is not None:
        raise PluginError(
            f'--speculative-draft-model-path: "{draft}" has another tokenizer than the model: {found}; choose a '
            "smaller model of the same family"
        )
