"""What an engine left behind is found by its mark, and ended once its pascaline is gone; nothing else is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.serving import strays

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_SECONDS = 30.0
WAITS = "import time; print(flush=True); time.sleep(600)"


@contextlib.contextmanager
def marked(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with a mark."""
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, env=os.environ | {strays.VARIABLE: mark}, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def ended_supervisor() -> str:
    """Return the beginning of a mark whose pascaline has ended."""
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE)
    found = strays._supervisor(process.pid)
    process.kill()
    process.communicate()
    return found


def test_an_orphan_is_ended_and_named() -> None:
    with marked(f"{ended_supervisor()}:7") as orphan, marked(strays.new_mark()) as ours:
        found = strays.end_orphans(PATIENCE_SECONDS)
        # Other tests may leave some at the same moment.
        assert [each.name for each in found if each.pid == orphan.pid] == [orphan_name(ours)]
        assert orphan.wait(PATIENCE_SECONDS) == -9
        assert ours.poll() is None


def orphan_name(like: subprocess.Popen[bytes]) -> str:
    """Return the kernel's name of a process."""
    return Path(f"/proc/{like.pid}/comm").read_text().strip()


def test_two_runs_have_two_marks() -> None:
    first, second = strays.new_mark(), strays.new_mark()
    assert first != second
    with marked(first) as one, marked(second) as other:
        assert strays.end(first, PATIENCE_SECONDS) == []
        assert one.wait(PATIENCE_SECONDS) == -9
        assert other.poll() is None


@pytest.mark.parametrize(
    "mark",
    [
        pytest.param(strays.new_mark(), id="lives"),
        pytest.param(f"{os.getpid()}:1", id="too short"),
        pytest.param(f"{2**22}:1:", id="no namespace"),
        pytest.param(f"{2**22}::{strays._namespace()}:0", id="no start"),
        pytest.param("", id="empty"),
        ":::",
        "words",
        pytest.param(f"{2**40}:1:elsewhere:0", id="another namespace"),
        pytest.param(f"{'9' * 5000}:1:{strays._namespace()}:0", id="5000 digits"),
    ],
)
def test_what_is_no_orphan(mark: str) -> None:
    """A pascaline that lives, one in another namespace of process ids, and what is no mark."""
    assert not strays._is_orphan(mark)


def test_another_process_with_the_number_of_a_pascaline_that_ended() -> None:
    assert strays._is_orphan(f"{os.getpid()}:1:{strays._namespace()}:0")


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), PermissionError(), OSError(12, "no memory")])
def test_what_cannot_be_read_is_no_orphan(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack on our side must not end the engine of another instance."""

    def fails(_: int) -> str:
        raise error

    monkeypatch.setattr(strays, "_start", fails)
    assert not strays._is_orphan(f"{2**22}:1:{strays._namespace()}:0")


def test_a_process_that_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strays, "_kill", lambda _: None)
    mark, began = strays.new_mark(), time.monotonic()
    with marked(mark) as process:
        assert [each.pid for each in strays.end(mark, 0.1)] == [process.pid]
    assert time.monotonic() - began < PATIENCE_SECONDS
