"""The README is true: its commands, its table, its links and its configuration are those of the project."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pascaline.cli import COMMANDS
from pascaline.configuration import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fenced_blocks() -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_first_block_holds_the_two_commands() -> None:
    clone = "git clone https://github.com/pascaline/pascaline && cd pascaline\n"
    assert fenced_blocks()[0] == ("sh", f"{clone}./dev serve\n./dev test\n")


def test_command_table_is_the_command_line() -> None:
    rows = re.findall(r"^\| `pascaline (\w+)` \| (.+) \|$", README, re.MULTILINE)
    assert dict(rows) == COMMANDS


PAGES = [path for pattern in ("*.md", "python/*/*.md", "docs/*.md") for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_example_configuration_is_valid(tmp_path: Path) -> None:
    [example] = [content for language, content in fenced_blocks() if language == "toml"]
    tomllib.loads(example)
    file = tmp_path / "emily.toml"
    file.write_text(example.replace('"…"', f'"{"0" * 64}"'))
    settings = load(config_file=file, environment={}, check_host=False).settings
    assert (settings.card, settings.context_length, settings.kv_cache.max_bytes) == ("tesla-p4", 4096, 2**30)
