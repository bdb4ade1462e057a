"""Text tables: one plain line for each row."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pascaline.text_table import LEFT, RIGHT, Column, table_lines


def test_columns_line_up_and_lines_end_without_spaces() -> None:
    rows = [["", "a", "bb", ""], ["x", "100", "2", "last"], ["yy", "3"], []]
    assert table_lines(rows, [LEFT, RIGHT, RIGHT, LEFT]) == ["      a  bb", "x   100   2  last", "yy    3", ""]


def test_widths_can_be_set() -> None:
    rows = [["long name", "1"], ["a", "12345"]]
    assert table_lines(rows, [Column(width=6), Column(right=True, min_width=6)], gap=1) == [
        "long …      1",
        "a       12345",
    ]


def test_a_wide_character_takes_two_cells() -> None:
    assert table_lines([["日本", "1"], ["abcde", "2"]], [LEFT, RIGHT]) == ["日本   1", "abcde  2"]


def test_no_text_is_markup_breaks_the_line_or_is_wrapped() -> None:
    """Names of files and models are others' words."""
    cell = "[red]a[/red]\n\x1b[31mb\u2028\udcff " + "c " * 500 + "d"
    shown = "[red]a[/red]\\n\\x1b[31mb\\u2028\\udcff " + "c " * 500 + "d"
    assert table_lines([[cell, "1"]], [LEFT, LEFT]) == [f"{shown}  1"]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"])
def test_the_environment_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "5")
    assert table_lines([["1.5", "abc def"]], [LEFT, LEFT]) == ["1.5  abc def"]


def test_help_does_not_pay_for_rich() -> None:
    """It takes 0.1 s to import."""
    code = "import sys, pascaline.cli as cli\ntry: cli.main(['plan', '--help'])\nfinally: assert 'rich.console' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
