"""One call that reads any model's header: a GGUF file or a Hugging Face folder, on disk or at a URL."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import ModelError
from pascaline.models.gguf import read_gguf
from pascaline.models.safetensors import read_safetensors
from pascaline.models.source import file_mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.models.spec import ModelSpec


def read_model(place: Path | str, headers: Mapping[str, str] | None = None) -> ModelSpec:
    """Read the model at a path (GGUF file, or folder with config.json and safetensors) or an http(s) URL of one.

    headers: of the requests to a URL.
    """
    if isinstance(place, str) and place.startswith(("http://", "https://")):
        from pascaline.models.remote import read_remote_model

        return read_remote_model(place, headers)
    path = Path(place)
    mode = file_mode(path)
    if mode is None:
        raise ModelError(f"failed to read {path}: there is no such file; name a GGUF file or a Hugging Face folder")
    if stat.S_ISDIR(mode):
        return read_safetensors(path)
    if path.suffix == ".safetensors" or path.name == "config.json":
        return read_safetensors(path.parent)
    return read_gguf(path)
