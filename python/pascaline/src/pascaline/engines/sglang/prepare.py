"""The folder that SGLang starts from instead of a GGUF file: its configuration and tokenizer, made by the plugin."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.errors import MissingError, ModelError, PascalineError, StorageError
from pascaline.file_locks import locked
from pascaline.inherited import inherited
from pascaline.models.cache import cache_folder, writing
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.settings import Settings

PREPARED_FORMAT = PLUGIN.prepared_format
"""Layout of a prepared folder."""
PREPARED_BYTES = 32 * 2**20
"""More than a prepared folder needs: tokenizers have at most some 20 MB."""


def prepare(settings: Settings, path: Path, digest: str) -> Path:
    """Return the folder that SGLang starts from; if it is missing, the plugin makes it in the engine's interpreter.

    path: the file, or the first part of a split model; digest: of all its files (combined_sha256).

    Made once for each file content, by one process at a time, and complete or not at all. Made anew if a file in it was
    changed, truncated or removed since.
    """
    folder = cache_folder(settings) / "prepared" / f"{digest}-v{PREPARED_FORMAT}"
    if _is_prepared_from(folder, path):
        # Nothing is written, so a full disk does not matter.
        return folder
    with writing(folder.parent, needed=PREPARED_BYTES), locked(folder.with_suffix(".lock")):
        if not _is_prepared_from(folder, path):
            # Left by attempts that were killed: the lock shows that none is running.
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            if not (folder / PLUGIN.manifest).is_file():
                # The plugin replaces only folders that it made.
                shutil.rmtree(folder, ignore_errors=True)
            _run_prepare(settings, path, digest, folder)
            _remember_files(folder)
    return folder


def _is_prepared_from(folder: Path, path: Path) -> bool:
    try:
        manifest = json.loads((folder / PLUGIN.manifest).read_text())
    except (OSError, ValueError):
        return False
    wanted = {"gguf": str(path), "format": PREPARED_FORMAT}
    return isinstance(manifest, dict) and wanted.items() <= manifest.items() and _is_undamaged(folder)


def _is_undamaged(folder: Path) -> bool:
    """Whether the folder still holds the files that it was made with; an engine may have added others."""
    try:
        made = json.loads(_checksums(folder).read_text())
        return isinstance(made, dict) and bool(made) and made.items() <= _sha256s(folder).items()
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _remember_files(folder: Path) -> None:
    fresh = _checksums(folder).with_suffix(".new")
    fresh.write_text(json.dumps(_sha256s(folder)))
    fresh.replace(_checksums(folder))


def _checksums(folder: Path) -> Path:
    """Return the file with the checksums of a folder's files; beside the folder, which is the plugin's."""
    return folder.with_suffix(".sha256.json")


def _sha256s(folder: Path) -> dict[str, str]:
    """Return the checksum of each file. A prepared folder has no weights, so that reading it takes milliseconds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _run_prepare(settings: Settings, path: Path, digest: str, folder: Path) -> None:
    python = str(settings.engine_executable or sys.executable)
    if shutil.which(python) is None:
        raise MissingError(f"engine_executable: {python} is not a program, must be a Python that can import sglang")
    command = with_parent(python, "-m", "sglang_pascal", "prepare", str(path), str(folder), "--known-sha256", digest)
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=inherited()
    )
    if result.returncode:
        raise _prepare_error(result, python)


def _prepare_error(result: subprocess.CompletedProcess[str], python: str) -> PascalineError:
    lines = result.stderr.strip().splitlines()
    reason = lines[-1].removeprefix("sglang-pascal: error: ") if lines else f"exit code {result.returncode}"
    if "No module named" in reason:
        return MissingError(
            f"{python} cannot import the engine ({reason}); install sglang-pascal, or set engine_executable"
        )
    if result.returncode == StorageError.exit_code:
        return StorageError(reason)
    if result.returncode == MissingError.exit_code:
        return MissingError(reason)
    return ModelError(reason)
