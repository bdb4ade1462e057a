"""Finds where SGLang asks whether it runs on CUDA, or on which compute capability, and compares that with our verdicts.

The plugin makes `is_cuda()` False, so each such place takes its other branch. `docs/results/cuda-checks.toml` names the
modules that are read and judges each use in them. A tensor's property `is_cuda` is no such use: it stays True.

    python tests/support/cuda_checks.py   # writes docs/results/cuda-checks.md
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RESULTS = Path(__file__).parents[2] / "docs/results"
VERDICTS = ("given back", "replaced", "harmless", "not reached")
_QUESTION = re.compile(
    r"_*(is_cuda(_alike)?|is_(sm\d+|blackwell|hopper|ampere)\w*|get_device_(capability|sm)|has_device_capability)"
)


@dataclass(frozen=True, order=True)
class Use:
    """One place: the module below sglang.srt, the function ("" at import), and the condition or statement."""

    module: str
    function: str
    condition: str


def verdicts() -> dict[str, Any]:
    """Return the file of verdicts.

    `modules` (paths below sglang/srt, with wildcards), `use` (a list of tables, one for each place in them) and `others`
    (a list of tables: further `modules`, and why no place in them matters).
    """
    return tomllib.loads((RESULTS / "cuda-checks.toml").read_text())


def installed_uses(patterns: list[str]) -> set[Use]:
    """Return the uses in the installed SGLang's modules. Raises ValueError for a pattern that no module matches."""
    root = _root()
    found: set[Use] = set()
    for pattern in patterns:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise ValueError(f"SGLang has no module {pattern}")
        for path in paths:
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            found |= set(uses(path.read_text(), module))
    return found


def unjudged(paths: Iterable[str], record: dict[str, Any]) -> set[str]:
    """Return those of some modules (paths below sglang/srt) that ask, and that neither `modules` nor `others` names."""
    known = [*record["modules"], *(pattern for group in record["others"] for pattern in group["modules"])]
    return {
        path
        for path in paths
        if not any(PurePath(path).match(pattern) for pattern in known) and any(uses((_root() / path).read_text(), ""))
    }


def _root() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("SGLang is not installed")
    return Path(spec.submodule_search_locations[0]) / "srt"


def uses(source: str, module: str) -> Iterator[Use]:
    """Return the uses in one module's source."""
    yield from _uses_below(ast.parse(source), module, "", "")


def _uses_below(node: ast.AST, module: str, function: str, condition: str) -> Iterator[Use]:
    for child in ast.iter_child_nodes(node):
        here, said = function, condition
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            here = f"{function}.{child.name}".lstrip(".")
        if isinstance(child, ast.stmt):
            said = _text(child)
        if _asks(child):
            yield Use(module, here, said)
        yield from _uses_below(child, module, here, said)


def _text(statement: ast.stmt) -> str:
    """The condition of a statement that has one, else its first line."""
    test = getattr(statement, "test", None)
    return ast.unparse(test if isinstance(test, ast.expr) else statement).partition("\n")[0]


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return isinstance(node.ctx, ast.Load) and bool(_QUESTION.fullmatch(node.id))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and bool(_QUESTION.fullmatch(node.func.attr))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
        asked = node.value.func
        return isinstance(asked, ast.Name) and asked.id == "get_platform" and bool(_QUESTION.fullmatch(node.attr))
    return False


def page(record: dict[str, Any]) -> str:
    """Return the page that shows the verdicts."""
    count = Counter(use["verdict"] for use in record["use"])
    lines = [
        "# What `is_cuda() = False` switches off in SGLang",
        "",
        "The plugin makes SGLang's `is_cuda()` False, because SGLang otherwise imports sgl_kernel and flashinfer, which",
        "have no code for Pascal. Every place that asks, or that asks for a compute capability, then takes its other",
        f"branch. This page judges the {sum(count.values())} places in the modules of SGLang 0.5.23 that serving dense",
        "text models runs, which are listed at its end. What a server only imports is judged by the module, under *Others*.",
        "The places were read, not run; verdicts are [data](cuda-checks.toml), and `tests/test_cuda_checks.py` fails if",
        "SGLang's sources gain or lose a place, or a server imports a module that asks and is not judged.",
        "`tests/support/cuda_checks.py` wrote this page.",
        "",
        "- *given back*: needed on Pascal too, and switched on again by a shim.",
        "- *replaced*: ours does the work of the branch that is off.",
        "- *harmless*: both branches are right here.",
        "- *not reached*: serving as we configure it does not come there.",
        "",
        ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS) + ".",
    ]
    for verdict in VERDICTS:
        lines += ["", f"## {verdict.capitalize()}", "", "| module | function | condition | why |", "|---|---|---|---|"]
        lines += [_row(use) for use in record["use"] if use["verdict"] == verdict]
    lines += ["", "## Others", "", "| modules | why no place in them matters |", "|---|---|"]
    lines += [
        f"| {', '.join(f'`{path}`' for path in group['modules'])} | {group['why']} |" for group in record["others"]
    ]
    lines += ["", "## Modules", "", *(f"- `{pattern}`" for pattern in record["modules"])]
    return "\n".join(lines) + "\n"


def _row(use: dict[str, str]) -> str:
    condition = use["condition"].replace("|", "\\|")
    return f"| `{use['module']}` | {use['function'] or 'at import'} | `{condition}` | {use['why']} |"


if __name__ == "__main__":
    (RESULTS / "cuda-checks.md").write_text(page(verdicts()))
