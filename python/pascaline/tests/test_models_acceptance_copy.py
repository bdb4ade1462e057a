"""The acceptance of a file has one text in two packages that are installed apart."""

from __future__ import annotations

from pathlib import Path

import pascaline.models.acceptance
import sglang_pascal.checkpoint.acceptance


def _files(module: object) -> dict[str, str]:
    folder = Path(str(module.__file__)).parent  # type: ignore[attr-defined]
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def test_both_packages_have_the_same_acceptance() -> None:
    ours, plugin = _files(pascaline.models.acceptance), _files(sglang_pascal.checkpoint.acceptance)
    assert ours == plugin, (
        "copy python/sglang-pascal/src/sglang_pascal/checkpoint/acceptance over "
        "python/pascaline/src/pascaline/models/acceptance"
    )
