"""The pages of GPU reports are what their program makes of the recorded figures, and read as reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPORTS = sorted((ROOT / "docs/results").glob("kernels-*.json"))


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_the_committed_page_is_what_the_program_makes(report: Path, tmp_path: Path) -> None:
    (tmp_path / report.name).write_bytes(report.read_bytes())
    program = [sys.executable, str(ROOT / "benchmarks/gpu_page.py"), str(tmp_path / report.name)]
    subprocess.run(program, check=True, timeout=120)
    page = (tmp_path / report.name).with_suffix(".html").read_text()
    assert page == report.with_suffix(".html").read_text(), f"run: ./dev exec python benchmarks/gpu_page.py {report}"


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_it_begins_with_sentences_and_charts_and_loads_nothing(report: Path) -> None:
    page, data = report.with_suffix(".html").read_text(), json.loads(report.read_text())
    assert page.index("What was found") < page.index("<svg") < page.index("<table")
    shares = [row["share_of_ggml"] for row in data["products"] if row.get("share_of_ggml") is not None]
    faster = sum(share <= 1 for share in shares)
    assert f"Matrix products: {faster} of {len(shares)} take no longer than llama.cpp" in page
    assert not re.findall(r"(?:src|href)=|<script|url\(", page)
