"""Makes the folder from which SGLang starts: configuration and tokenizer from a GGUF file, and the file's path.

The folder appears by one rename, complete or not at all. Weights are not copied: `pascal.json` names the file, its size
and checksums, and the loader refuses a file that has changed since. Of a split model, one part is named and the others
are found beside it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gguf_acceptance import Header, Tensor, accept, combined_sha256, file_sha256

from sglang_pascal.checkpoint.chat_template import write_chat_templates
from sglang_pascal.checkpoint.config import generation_config, model_config
from sglang_pascal.checkpoint.gguf_file import GgufFile
from sglang_pascal.checkpoint.tokenizer import tokenizer_config, write_tokenizer
from sglang_pascal.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORMAT: Final = 2
"""Version of the folder's layout; a folder of another version is refused."""
MANIFEST: Final = "pascal.json"
_FULL_DISK: Final = (errno.ENOSPC, errno.EDQUOT)
_FOLDER_MODE: Final = 0o755


@dataclass(frozen=True)
class Manifest:
    """Contents of pascal.json."""

    gguf: str
    """Absolute path of the GGUF file, or of the first part of a split model."""
    sha256: str
    """Checksum of the whole file, in hexadecimal; of a split model, `combined_sha256` of its parts' checksums."""
    size: int
    """Bytes of all files."""
    header_sha256: str
    """Checksum of everything before the tensor data of each file: cheap enough to compare at each start."""
    architecture: str
    format: int = FORMAT


def prepare(
    gguf: Path,
    folder: Path,
    *,
    sha256: str | None = None,
    known_sha256: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make the folder; keep an existing one that was made from the same file.

    gguf: the file, or any part of a split model.
    sha256: the checksum that the file must have, in hexadecimal; for a split model one per part, in order, separated by
    commas; None = only compute it.
    known_sha256: its checksum if the caller has computed it (Manifest.sha256); the file is then not read for it again.
    on_progress: called with (bytes hashed, total bytes).
    """
    gguf, folder = gguf.absolute(), folder.absolute()
    file = GgufFile(gguf)
    manifest = _manifest(file, known_sha256 or _checked_sha256(file, sha256, on_progress))
    if folder.exists() and not _is_replaceable(folder):
        raise StorageError(f'"{folder}" exists and was not made by this command; name another folder or remove it')
    with _atomic_folder(folder) as staging:
        write_folder(file, manifest, staging)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a prepared folder; check its format."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f'"{path}" has format {content["format"]}, expected {FORMAT}; prepare it again')
        return Manifest(**content)
    except FileNotFoundError as exc:
        raise CheckpointError(
            f'"{folder}" is not a prepared model: {MANIFEST} is missing; run sglang-pascal prepare'
        ) from exc
    except (json.JSONDecodeError, KeyError, TypeError) as exc:
        raise CheckpointError(f'"{path}" is damaged: {exc!r}; prepare the model again') from exc


def open_prepared(folder: Path) -> GgufFile:
    """Open the GGUF file of a prepared folder; an error if it is missing or not the one that was prepared."""
    manifest = read_manifest(folder)
    file = GgufFile(Path(manifest.gguf))
    if file.size != manifest.size:
        raise CheckpointError(
            f'"{manifest.gguf}" has {file.size} bytes, but had {manifest.size} when "{folder}" was prepared; '
            "prepare it again"
        )
    if file.header_sha256() != manifest.header_sha256:
        raise CheckpointError(f'"{manifest.gguf}" has changed since "{folder}" was prepared; prepare it again')
    return file


def write_folder(file: GgufFile, manifest: Manifest, folder: Path) -> None:
    """Write all files of a prepared folder into an existing one."""
    require_accepted(file)
    _write_json(folder / "config.json", model_config(file))
    _write_json(folder / "generation_config.json", generation_config(file))
    write_tokenizer(file.metadata, folder)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file.metadata))
    write_chat_templates(file.metadata, folder)
    _write_json(folder / MANIFEST, asdict(manifest))


def require_accepted(file: GgufFile) -> None:
    """Raise CheckpointError if the file cannot be served as it describes itself: now, not while SGLang starts."""
    tensors = {name: Tensor(info.tensor_type.name, info.shape) for name, info in file.tensors.items()}
    verdict = accept(Header(file.metadata, tensors))
    if verdict.refusals:
        raise CheckpointError(f'"{file.path}": {verdict.sentence}')


def _manifest(file: GgufFile, sha256: str) -> Manifest:
    architecture = str(file.metadata.get("general.architecture"))
    return Manifest(str(file.path), sha256, file.size, file.header_sha256(), architecture)


def _checked_sha256(file: GgufFile, expected: str | None, on_progress: Callable[[int, int], None] | None) -> str:
    wanted: list[str | None] = [None] * len(file.parts)
    if expected is not None:
        wanted = list(expected.lower().split(","))
        if len(wanted) != len(file.parts):
            raise CheckpointError(
                f'"{file.path}" is a model of {len(file.parts)} files, but {len(wanted)} checksums are given; each '
                "covers one file alone: give one for each, in order, separated by commas"
            )
    digests, before = [], 0
    for part, digest in zip(file.parts, wanted, strict=True):
        found = file_sha256(part.path, partial(_report, on_progress, before, file.size) if on_progress else None)
        if digest not in (None, found):
            raise CheckpointError(f'"{part.path}" has sha256 {found}, expected {digest}; copy or download it again')
        digests.append(found)
        before += len(part.data)
    return combined_sha256(digests)


def _report(on_progress: Callable[[int, int], None], before: int, total: int, done: int, _part_total: int) -> None:
    on_progress(before + done, total)


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST).is_file() or not any(folder.iterdir()))


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a sibling folder to write into. At the end it replaces `folder`; after an error it is removed."""
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging
        staging.chmod(_FOLDER_MODE)
        _replace_folder(staging, folder)
    except OSError as exc:
        reason = "no space is left on the disk" if exc.errno in _FULL_DISK else (exc.strerror or str(exc))
        raise StorageError(f'failed to write "{folder}": {reason}') from exc
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(staging: Path, folder: Path) -> None:
    """Rename. An existing folder is moved aside first, because a rename does not replace a folder with content."""
    for path in [*staging.rglob("*"), staging]:
        _flush(path)
    old = staging.with_name(f"{staging.name}.old")
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force to disk, so that complete files are there if the power fails after the rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
