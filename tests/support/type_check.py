"""Runs the type checker beside the tests: it uses one core for most of a minute, while many tests wait.

A pytest plugin (`-p support.type_check` in python/pyproject.toml). With `--types`, mypy starts with the session, its report
is part of the summary, and what it finds gives exit code 2, whatever became of the tests.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

PYTHON = Path(__file__).resolve().parents[2] / "python"
EXIT_CODE = 2
STOP_SECONDS = 10.0
_checker = pytest.StashKey[tuple[subprocess.Popen[bytes], IO[bytes]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --types."""
    parser.addoption("--types", action="store_true", help="run the type checker beside the tests")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start mypy, unless this is a worker of pytest-xdist."""
    if session.config.option.types and not hasattr(session.config, "workerinput"):
        output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the session
        command = [sys.executable, "-m", "mypy"]
        process = subprocess.Popen(command, cwd=PYTHON, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        session.config.stash[_checker] = process, output


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Wait for mypy, unless the tests were interrupted."""
    if found := session.config.stash.get(_checker, None):
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            found[0].terminate()
        if found[0].wait():
            session.exitstatus = EXIT_CODE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what mypy printed."""
    if found := config.stash.get(_checker, None):
        terminalreporter.section("types")
        found[1].seek(0)
        terminalreporter.write(found[1].read().decode(errors="replace"))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave no checker behind, however the session ended."""
    if found := config.stash.get(_checker, None):
        found[0].kill()
        found[0].wait(STOP_SECONDS)
        found[1].close()
