"""The makers of test models: their files have the published sizes, so that plans tested on them mean something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pascaline.models.reader import read_model
from support.hf_models import write_folder
from support.models import PUBLISHED_BYTES, SHAPES, tiny, write_gguf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("name", "mixture"), PUBLISHED_BYTES)
def test_a_sparse_model_has_the_published_size(tmp_path: Path, name: str, mixture: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", SHAPES[name], mixture, sparse=True)
    assert path.stat().st_size == pytest.approx(PUBLISHED_BYTES[name, mixture], rel=0.001)
    assert path.stat().st_blocks * 512 < 16 << 20


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_both_formats_of_a_tiny_model_say_the_same(tmp_path: Path, architecture: str) -> None:
    shape = tiny(architecture)
    gguf = read_model(write_gguf(tmp_path / "model.gguf", shape, "F16"))
    folder = read_model(write_folder(tmp_path / "folder", shape))
    for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        assert getattr(gguf, field) == getattr(folder, field), field
    for field in ("vocab_size", "context_length", "sliding_window", "sliding_layer_ids", "tied_embeddings"):
        assert getattr(gguf, field) == getattr(folder, field), field
    assert gguf.n_parameters == folder.n_parameters
