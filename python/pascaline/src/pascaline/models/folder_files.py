"""The files of a Hugging Face folder that decide what is served, and one checksum for all of them.

The checksum is the sha256 of the list that sha256sum prints for these files, sorted by name (LC_ALL=C), from within the
folder: `sha256sum FILE… | sha256sum`. `pascaline models checksum FOLDER` prints both.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pascaline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

CONFIG_NAME = "config.json"
SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})
"""Weights, configuration, tokeniser and chat templates. An engine does not read other files, such as README.md."""
SUBFOLDERS = ("1_Pooling", "additional_chat_templates")
"""Folders within it that an engine reads: how vectors are pooled, and further chat templates."""


def is_model_folder(path: Path) -> bool:
    """Return whether a path is a folder with a model of safetensors, and no GGUF file."""
    if not path.is_dir():
        return False
    suffixes = {file.suffix for file in path.iterdir()}
    return ".gguf" not in suffixes and (".safetensors" in suffixes or (path / CONFIG_NAME).is_file())


def folder_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that the checksum covers, relative to the folder, in order."""
    try:
        return tuple(sorted(_names(folder), key=str.encode))
    except OSError as error:
        raise ModelError(f"failed to read {folder}: {error.strerror}") from error


def _names(folder: Path) -> Iterator[str]:
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        for file in place.iterdir() if place.is_dir() else ():
            if file.suffix in SUFFIXES and not file.name.startswith((".", "consolidated")) and file.is_file():
                yield str(file.relative_to(folder))


def listing(digests: Mapping[str, str]) -> str:
    """Return the list that the checksum is taken of, as sha256sum prints it. digests: by name, in order."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def folder_sha256(names: Sequence[str], digests: Sequence[str]) -> str:
    """Return the checksum of a folder from those of its files."""
    return hashlib.sha256(listing(dict(zip(names, digests, strict=True))).encode()).hexdigest()
