"""The makers of test models: their files have the published sizes, so that plans tested on them mean something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.models import PUBLISHED_BYTES, SHAPES, write_gguf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("name", "mixture"), PUBLISHED_BYTES)
def test_a_sparse_model_has_the_published_size(tmp_path: Path, name: str, mixture: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", SHAPES[name], mixture, sparse=True)
    assert path.stat().st_size == pytest.approx(PUBLISHED_BYTES[name, mixture], rel=0.001)
    assert path.stat().st_blocks * 512 < 16 << 20
