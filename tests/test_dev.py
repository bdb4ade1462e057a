"""`./dev` explains itself, whatever way one asks; nothing is installed for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def dev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "dev", *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [(), ("help",), ("--help",), ("-h",)])
def test_help_is_the_same_however_one_asks(arguments: tuple[str, ...]) -> None:
    done = dev(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == dev("help").stdout
    assert "./dev serve" in done.stdout


def test_an_unknown_command_is_an_error_with_the_usage() -> None:
    done = dev("sevre")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "dev: unknown command 'sevre'"
    assert "./dev serve" in done.stderr


def test_compiling_says_how_much_it_compiles(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=120)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "good.py").write_text("x = 1\n")
    (site / "template.py").write_text("{{ not python }} :\n")
    command = [tmp_path / "venv/bin/python", ROOT / "python/compile_environment.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "dev: compiling 2 modules to bytecode; every later start is faster for it\n"
    assert [path.name.partition(".")[0] for path in (site / "__pycache__").iterdir()] == ["good"]
    (site / "template.py").unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert again.stderr == ""
    (site / "good.py").write_text("x = 2\n")
    os.utime(site / "good.py", (1e9, 1e9))
    changed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert changed.stderr.startswith("dev: compiling 1 modules")


@pytest.mark.parametrize(("found", "expected"), [("Success: no issues", 0), ("m.py:1: error: of a type", 2)])
def test_types_are_checked_beside_the_tests(found: str, expected: int, tmp_path: Path) -> None:
    """A wrong type is no failed test: CI runs those once more, and forgives them if they pass alone."""
    (tmp_path / "mypy.py").write_text(f"print({found!r})\nraise SystemExit({expected})\n")
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-c", tmp_path / "pytest.ini", "-p", "support.type_check", "--types"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [*command, tmp_path], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expected, done.stdout
    assert re.search(rf"^=+ types =+\n{re.escape(found)}\n", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].strip("= ").startswith("1 passed")
