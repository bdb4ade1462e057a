"""Whether a model has a chat template: without one, messages cannot be made into a prompt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

KEY = "tokenizer.chat_template"
_FILES = ("chat_template.jinja", "chat_template.json")


def has_chat_template(spec: ModelSpec, path: Path) -> bool:
    """Return whether the GGUF file has any template in its metadata, or the folder one among its files."""
    if spec.format == "gguf":
        return any(key == KEY or key.startswith(f"{KEY}.") for key, value in spec.metadata.items() if value)
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in _FILES):
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
