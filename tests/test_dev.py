"""`./dev` explains itself, whatever way one asks; nothing is installed for it."""

from __future__ import annotations

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
