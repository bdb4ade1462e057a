"""Two minutes of the soak: mixed load with random faults; `benchmarks/soak.py` runs it for hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"
SECONDS = 120


@pytest.mark.slow("a few minutes: mixed load with random faults")
def test_nothing_is_unexplained_and_nothing_grows(capsys: pytest.CaptureFixture[str]) -> None:
    """The seed is printed: with it the same faults come again."""
    command = [sys.executable, str(SOAK), f"--seconds={SECONDS}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=590)
    with capsys.disabled():
        print(f"\n{result.stderr}{result.stdout}")
    assert result.returncode == 0, result.stdout + result.stderr
