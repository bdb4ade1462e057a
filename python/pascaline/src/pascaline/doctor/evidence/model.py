"""Facts about the model, and whether it is the right one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.doctor.host import ModelFacts
from pascaline.errors import PascalineError
from pascaline.models import resolve
from pascaline.models.cache import cache_folder
from pascaline.models.chat_template import has_chat_template
from pascaline.models.folder_files import folder_sha256
from pascaline.models.gguf import open_gguf
from pascaline.models.reader import read_model

if TYPE_CHECKING:
    from pascaline.doctor.machine import Machine
    from pascaline.settings import Settings


def collect_model(machine: Machine, settings: Settings | None) -> ModelFacts:
    """Read the header, the presence of a tokeniser, the checksum if one is required, and the speed of its disk."""
    if settings is None:
        return ModelFacts()
    try:
        named, _ = resolve.locate(settings)
        path = machine.path(named) if machine.root != Path("/") and not named.exists() else named
        spec = read_model(path)
        files = resolve.model_files(spec, path)
        tokenizer, template = _has_tokenizer(files[0]), has_chat_template(spec, files[0])
    except PascalineError as error:
        return ModelFacts(path=settings.model, error=str(error))
    checksum, checksum_error = _checksum(settings, files, machine.path(cache_folder(settings)))
    file = Path(str(spec.files[0]))
    return ModelFacts(
        path=str(path),
        spec=spec,
        sha256=checksum,
        checksum_error=checksum_error,
        has_tokenizer=tokenizer,
        has_chat_template=template,
        read_bytes_per_second=machine.read_speed(file),
    )


def _has_tokenizer(path: Path) -> bool:
    """Return whether a model has a tokeniser."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        return bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"})
    with open_gguf(path) as header:
        return "tokenizer.ggml.tokens" in header.metadata


def _checksum(settings: Settings, files: tuple[Path, ...], cache: Path) -> tuple[tuple[str, ...], str]:
    """Return (sha256 of each file, or of a folder; error), cached by the resolver; empty if no checksum is required."""
    if settings.model_sha256 is None:
        return (), ""
    try:
        if files[0].is_dir():
            digests = resolve.folder_digests(files[0], cache)
            return (folder_sha256(tuple(digests), tuple(digests.values())),), ""
        return tuple(resolve.cached_sha256(file, cache) for file in files), ""
    except (PascalineError, OSError) as error:
        return (), str(error)
