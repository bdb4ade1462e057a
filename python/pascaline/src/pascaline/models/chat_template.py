"""The chat templates of a model: without one, messages cannot be made into a prompt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pascaline.models.gguf import open_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

KEY = "tokenizer.chat_template"
_FILES = ("chat_template.jinja", "chat_template.json")


def has_chat_template(spec: ModelSpec, path: Path) -> bool:
    """Return whether the GGUF file has any template in its metadata, or the folder one among its files."""
    return bool(chat_templates(spec, path))


def chat_templates(spec: ModelSpec, path: Path) -> str:
    """Return the text of all templates of a model, one after the other; empty if it has none.

    path: the file (the first part of a split model), or the folder. Raises ModelError if it cannot be read any more.
    """
    if spec.format == "gguf":
        keys = [key for key in spec.metadata if key == KEY or key.startswith(f"{KEY}.")]
        return "\n".join(filter(None, _gguf_texts(path, keys))) if keys else ""
    folder = path if path.is_dir() else path.parent
    texts = [_text(folder / name) for name in _FILES]
    try:
        config = json.loads(_text(folder / "tokenizer_config.json") or "null")
    except ValueError:
        config = None
    if isinstance(config, dict):
        texts += _texts(config.get("chat_template"))
    return "\n".join(filter(None, texts))


def _gguf_texts(path: Path, keys: list[str]) -> list[str]:
    """Read from the file: the spec keeps only short texts, and the template of a model with tools is a long one."""
    with open_gguf(path) as header:
        return [value for key in keys if isinstance(value := header.metadata.value(key), str)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _texts(value: Any) -> list[str]:
    """Hugging Face's value: one template, or a list of {"name": …, "template": …}."""
    if isinstance(value, list):
        return [str(each.get("template", "")) for each in value if isinstance(each, dict)]
    return [str(value)] if value else []
