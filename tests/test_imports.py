"""Imports of pascaline go down only, in the order of the tables in its README and in docs/architecture.md."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "python/pascaline/src/pascaline"
TABLES = {
    ROOT / "python/pascaline/README.md": "| module | what is in it |",
    ROOT / "docs/architecture.md": "| in `python/pascaline/src/pascaline` | what | does I/O |",
}
ENTRY = {"__main__", "service"}
"""Modules above all others: the program's entry, and the unit file that `pascaline service` writes."""


def rows(page: Path) -> dict[str, int]:
    """Module -> number of its row."""
    _, _, after = page.read_text().partition(TABLES[page])
    table = after.strip().split("\n\n")[0].splitlines()[1:]
    names = [re.findall(r"`(\w+)(?:/|\.py)?`", line.split("|")[1]) for line in table]
    return {name: index for index, line in enumerate(names) for name in line}


@functools.cache
def imports() -> dict[tuple[str, str], Path]:
    """(module, module that it imports when it runs) -> a file that does."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pascaline":
                package = (node.module or "").split(".")
                targets = package[1:2] or [alias.name for alias in node.names if not alias.name.startswith("__")]
                found |= {(module, target): path for target in targets if target != module}
    return found


@pytest.mark.parametrize("page", TABLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_imports_go_down(page: Path) -> None:
    order = rows(page)
    assert len(order) >= 15, f"{page} has no table under {TABLES[page]!r}"
    helpers = len(order)
    wrong = [
        f"{path.relative_to(SOURCE)} imports {target}"
        for (module, target), path in imports().items()
        if module not in ENTRY and order.get(module, helpers) > order.get(target, helpers)
    ]
    assert wrong == []


@pytest.mark.parametrize("page", TABLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_names_what_exists(page: Path) -> None:
    assert [name for name in rows(page) if not ((SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file())] == []


def test_no_two_modules_import_each_other() -> None:
    edges = imports().keys()
    assert [pair for pair in edges if pair[::-1] in edges] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports for types alone count too: a file that is in a circle cannot be understood by itself."""
    assert [sorted(circle) for circle in circles(file_imports())] == []


def file_imports() -> dict[str, set[str]]:
    """Each file's module -> the modules that it imports, all in full."""
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        named = {(node.module or "", alias.name) for node in nodes for alias in node.names}
        full = {
            (f"{package}.{name}".removeprefix("pascaline."), package.removeprefix("pascaline."))
            for package, name in named
        }
        found[module] = {whole if whole in files else package for whole, package in full} & files.keys() - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach each other: what is left when those without imports, or importers, are removed."""
    left = {module: set(targets) for module, targets in graph.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    return [set(left)] if left else []
