"""No file outside an engine's folder knows an engine by its name, nor one of its series: it asks the interface."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pascaline.engines import ENGINES
from pascaline.settings import ENGINE_FOLDERS, Settings

SOURCE = Path(__file__).parents[1] / "src/pascaline"
FILES = sorted(
    path
    for path in SOURCE.rglob("*.py")
    if not any(path.is_relative_to(SOURCE / "engines" / folder) for folder in ENGINE_FOLDERS.values())
)
PACKAGES = {
    "bench/environment.py": "versions of Python packages that a result names",
    "doctor/checks/engine.py": "the Python package that a check is about",
    "plugin.py": "a key of the plugin's facts",
}
"""File -> what the text means there, although it equals an engine's name."""
SERIES = re.compile("|".join(rf"\b{engine.series.running.name.partition(':')[0]}:\w" for engine in ENGINES.values()))


def texts(path: Path) -> list[tuple[int, str]]:
    """Line and text of each literal, also of those inside f-strings, except docstrings."""
    tree = ast.parse(path.read_text())
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_name_and_no_series(path: Path) -> None:
    """Any literal that equals a name: in a comparison, a match, a table, an argument."""
    found = texts(path)
    if str(path.relative_to(SOURCE)) not in PACKAGES:
        assert [line for line, text in found if text in ENGINES] == []
    assert [line for line, text in found if SERIES.search(text)] == []


def test_every_exception_is_needed() -> None:
    assert [name for name in PACKAGES if not any(text in ENGINES for _, text in texts(SOURCE / name))] == []


def test_the_registry_and_the_setting_have_the_same_names() -> None:
    assert list(ENGINES) == list(ENGINE_FOLDERS)
    assert [engine.name for engine in ENGINES.values()] == list(ENGINES)
    assert Settings.model_json_schema()["properties"]["engine"]["enum"] == list(ENGINES)
    assert next(iter(ENGINES)) == Settings().engine
