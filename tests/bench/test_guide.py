"""docs/guide.md: its figures are those of the script, every row of the guide has its answer, every picture is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guide.md"


def test_figures_and_pictures_are_those_of_the_script() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/guide.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_row_of_the_guide_is_answered() -> None:
    """17 rows, each with the guide's claim, what is true, and what pascaline does."""
    section = GUIDE.read_text().partition("## Row by row\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 18))
    assert all(len(row) == 4 and all(cell.strip(" |") for cell in row) for row in rows)


def test_the_fraction_in_row_13_is_that_of_the_table() -> None:
    """The guide's 8 tok/s at batch 4 beside the plan's estimate, which changes with the planner."""
    text = GUIDE.read_text()
    table = text.partition("<!-- generated: batch -->")[2]
    claim, plan = re.search(r"\| 4 \| (\d+) tok/s \| (\d+) tok/s", table).groups()
    part = {5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth", 9: "ninth", 10: "tenth"}[round(int(plan) / int(claim))]
    assert re.findall(r"8 tok/s at batch 4 is an? (\w+) of the \[estimate\]", text) == [part]


def test_pictures_and_pages_exist() -> None:
    places = re.findall(r"\]\(([^)#]+)", GUIDE.read_text())
    assert places
    assert [place for place in places if not (GUIDE.parent / place).exists()] == []


def test_sections_that_are_linked_to_exist() -> None:
    text = GUIDE.read_text()
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^## (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
