"""What the model is, and whether it is the right one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.doctor.evidence.instance import json_object
from pascaline.doctor.host import ModelFacts
from pascaline.errors import PascalineError
from pascaline.models import store
from pascaline.models.gguf import open_gguf
from pascaline.models.reader import read_model

if TYPE_CHECKING:
    from pascaline.doctor.machine import Machine
    from pascaline.settings import Settings


def collect_model(machine: Machine, settings: Settings | None) -> ModelFacts:
    """Read the header, the tokeniser's presence, the checksum where one is required, and the speed of its disk."""
    if settings is None:
        return ModelFacts()
    try:
        named, _ = store.locate(settings)
        path = machine.path(named) if machine.root != Path("/") and not named.exists() else named
        spec = read_model(path)
        files = store.model_files(spec, path)
        tokenizer, template = _tokenizer(files[0])
    except PascalineError as error:
        return ModelFacts(path=settings.model, error=str(error))
    checksum, checksum_error = _checksum(settings, files, machine.path(store.cache_folder(settings)))
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


def _tokenizer(path: Path) -> tuple[bool, bool]:
    """Return whether a model has a tokeniser and a chat template."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        config = json_object((path / "tokenizer_config.json").read_text()) if "tokenizer_config.json" in names else None
        template = bool(names & {"chat_template.jinja", "chat_template.json"}) or "chat_template" in (config or {})
        return bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"}), template
    with open_gguf(path) as header:
        metadata = header.metadata
        return "tokenizer.ggml.tokens" in metadata, "tokenizer.chat_template" in metadata


def _checksum(settings: Settings, files: tuple[Path, ...], cache: Path) -> tuple[tuple[str, ...], str]:
    """Return (sha256 of each file, error), remembered by the store; nothing where no checksum is required."""
    if settings.model_sha256 is None or files[0].is_dir():
        return (), ""
    try:
        return tuple(store.cached_sha256(file, cache) for file in files), ""
    except (PascalineError, OSError) as error:
        return (), str(error)
