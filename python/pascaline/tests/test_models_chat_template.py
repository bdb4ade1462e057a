"""Whether a model has a chat template, by its file or its folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from pascaline.models.chat_template import has_chat_template
from pascaline.models.reader import read_model
from support.hf_models import write_folder
from support.models import tiny, write_gguf
from support.raw_models import LLAMA, gguf_file, value

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.chat_template": "{{ messages }}"},
        {"tokenizer.chat_template": "x" * 5000},
        {"tokenizer.chat_template.tool_use": "{{ tools }}"},
    ],
)
def test_a_gguf_file(tmp_path: Path, metadata: dict[str, str]) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "Q8_0", sparse=True, metadata=metadata)
    assert has_chat_template(read_model(path), path)


def test_a_gguf_file_without_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file(LLAMA | {"tokenizer.chat_template": value("string", "")}))
    assert not has_chat_template(read_model(path), path)


@pytest.mark.parametrize(
    ("name", "content", "chats"),
    [
        ("chat_template.jinja", "{{ messages }}", True),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"}), True),
        ("tokenizer_config.json", json.dumps({"chat_template": None}), False),
        ("tokenizer_config.json", "[]", False),
        ("tokenizer_config.json", "{", False),
        ("README.md", "", False),
    ],
)
def test_a_folder(tmp_path: Path, name: str, content: str, chats: bool) -> None:
    folder = write_folder(tmp_path / "m", tiny("llama"))
    (folder / name).write_text(content)
    assert has_chat_template(read_model(folder), folder) is chats
