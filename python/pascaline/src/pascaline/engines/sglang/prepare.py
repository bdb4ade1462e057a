"""The folder that SGLang starts from instead of a GGUF file: its configuration and tokenizer, made by the plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.errors import MissingError, ModelError, PascalineError, StorageError
from pascaline.models.cache import cache_folder, locked, writing
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

    Made once for each file content, by one process at a time, and complete or not at all.
    """
    folder = cache_folder(settings) / "prepared" / f"{digest}-v{PREPARED_FORMAT}"
    with writing(folder.parent, needed=PREPARED_BYTES), locked(folder.with_suffix(".lock")):
        if not _is_prepared_from(folder, path):
            # Left by attempts that were killed: the lock shows that none is running.
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            _run_prepare(settings, path, digest, folder)
    return folder


def _is_prepared_from(folder: Path, path: Path) -> bool:
    try:
        manifest = json.loads((folder / PLUGIN.manifest).read_text())
    except (OSError, ValueError):
        return False
    wanted = {"gguf": str(path), "format": PREPARED_FORMAT}
    return isinstance(manifest, dict) and wanted.items() <= manifest.items()


def _run_prepare(settings: Settings, path: Path, digest: str, folder: Path) -> None:
    python = str(settings.engine_executable or sys.executable)
    if shutil.which(python) is None:
        raise MissingError(f"engine_executable: {python} is not a program, must be a Python that can import sglang")
    command = with_parent(python, "-m", "sglang_pascal", "prepare", str(path), str(folder), "--known-sha256", digest)
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
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
