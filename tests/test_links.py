"""What pages and comments point at is there: links and their anchors, and the files that they name."""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "hosts", "modules", "python", "templates", "tests", ".github")
LEFT_OUT = re.compile(r"\.venv|__pycache__|\.\w+_cache|prebuilt")
"""Folders of what is installed, cached or built."""


def files_below(folder: Path) -> list[Path]:
    """Files in a folder and below, without walking through the environment's 70,000."""
    found = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not LEFT_OUT.fullmatch(name)]
        found += [Path(path, name) for name in names]
    return found


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*"), *(path for folder in FOLDERS for path in files_below(ROOT / folder))]
    if path.is_file() and not path.is_relative_to(ROOT / "tests/doctor/hosts")
)
TAILS = {name.split("/", n)[n] for name in FILES for n in range(name.count("/") + 1)}
"""Every path, and its remainders without the first folders."""
PAGES = [name for name in FILES if name.endswith(".md") and not name.startswith("docs/results/")]
SOURCES = [name for name in FILES if name.endswith((".py", ".cu", ".cuh", ".nix", ".sh"))]
NAMED = re.compile(r"(?<![\w/.:-])(?<!> )(?:\.\.?/)*((?:[\w.-]+/)*[\w-]+\.(?:py|cuh?|nix|md|sh|toml))(?![\w/-])")
"""A path, other than what a command writes (`> FILE`)."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

ELSEWHERE: dict[str, str] = {
    r"(mem_cache|models|configs|layers|parser|function_call|managers|entrypoints(/openai)?)/\w+\.py|environ\.py|_detector\.py": "SGLang",
    r"modeling_llama\.py": "transformers",
    r"(llama\.cpp/)?convert_hf_to_gguf\.py|mmv[fq]\.cu|mmq\.cu|fattn(-common|-tile)?\.cuh?|ggml-cuda\.cu|docs/gguf\.md|tools/server/README\.md": "llama.cpp and ggml",
    r"constants\.py": "gguf-py",
    r"docs/models\.md": "the repository that the sentence names",
    r"FILE\.md": "a placeholder",
}
"""Files of others that comments and pages cite -> whose they are."""


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    own = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    return own | {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_links_of_pages_lead_somewhere() -> None:
    wrong = []
    for page in PAGES:
        for target in LINK.findall((ROOT / page).read_text()):
            path, _, anchor = target.partition("#")
            place = (ROOT / page).parent / path if path else ROOT / page
            if re.match(r"[a-z]+:", target):
                continue
            if not place.exists() or (
                anchor and place.suffix == ".md" and anchor not in anchors(str(place.resolve().relative_to(ROOT)))
            ):
                wrong.append(f"{page} links to {target}")
    assert wrong == []


def comments(name: str) -> str:
    """Comments and docstrings of a source file; a page is text as a whole."""
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = [token.string for token in tokens if token.type == tokenize.COMMENT]
        texts = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
        found += [each.value for each in texts if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        return "\n".join(found)
    if name.endswith(".md"):
        return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"(?:#|//) .*", text))


@pytest.fixture(scope="module")
def lost() -> list[tuple[str, str]]:
    """(file, what it names) for what is neither a path of the repository, nor the end of one, nor beside the file."""
    return [
        (name, named)
        for name in (*PAGES, *SOURCES)
        for named in NAMED.findall(comments(name))
        if named not in TAILS and not ((ROOT / name).parent / named).exists()
    ]


def test_files_that_are_named_exist(lost: list[tuple[str, str]]) -> None:
    assert [each for each in lost if not any(re.fullmatch(pattern, each[1]) for pattern in ELSEWHERE)] == []


def test_every_exception_is_needed(lost: list[tuple[str, str]]) -> None:
    assert [pattern for pattern in ELSEWHERE if not any(re.fullmatch(pattern, named) for _, named in lost)] == []
