"""How much memory an engine's processes hold, and when its growth is called a leak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.serving.memory_use import SAMPLE_SECONDS, MemoryUse, resident_bytes

GIB = 2**30


def use(*samples: tuple[float, float]) -> MemoryUse:
    """(seconds, GiB)"""
    found = MemoryUse()
    for when, gibibytes in samples:
        found.sampled(when, int(gibibytes * GIB))
    return found


def test_growth_is_named_with_its_rate() -> None:
    leak = use((0, 2), (1800, 3), (7200, 7)).leak
    assert leak == "its memory grew from 2.00 GiB when it was ready to 7.00 GiB (2.50 GiB an hour)"


@pytest.mark.parametrize(
    "samples",
    [
        (),
        ((0, 2),),
        ((0, 2), (7200, 2.4)),  # less than a quarter
        ((0, 0.1), (7200, 0.15)),  # less than 64 MiB
        ((0, 2), (7200, 1)),
        ((0, 2), (60, 9), (7200, 2.1)),  # it was given back
        ((0, 2), (7200, 0)),  # its processes have ended
    ],
)
def test_what_is_no_leak(samples: tuple[tuple[float, float], ...]) -> None:
    assert use(*samples).leak is None


def test_samples_are_taken_now_and_then() -> None:
    found = MemoryUse()
    assert found.is_due(0.0)
    found.sampled(10.0, GIB)
    assert not found.is_due(10.0 + SAMPLE_SECONDS / 2)
    assert found.is_due(10.0 + SAMPLE_SECONDS)


def test_all_processes_of_the_session_count_and_no_others() -> None:
    code = "import subprocess, sys; kept = b'x' * 2**25; print(flush=True); sys.stdin.read()"
    leader = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", leader], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 2**25 < resident_bytes(process.pid) < 2**27
    assert resident_bytes(process.pid) == 0


def test_a_folder_that_vanishes_meanwhile_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "8").mkdir()
    (tmp_path / "8/stat").write_text("8 (a) b) S 1 5 5 0")
    (tmp_path / "8/status").write_text("Name:\ta) b\nRssAnon:\t    12 kB\n")
    assert resident_bytes(5, tmp_path) == 12 * 1024
    assert resident_bytes(os.getpid(), tmp_path) == 0
