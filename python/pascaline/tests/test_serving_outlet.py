"""A stream whose reader stops, goes away or comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.serving.outlet import Outlet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CAPACITY = 4096
PATIENCE = 20.0
LINE = "x" * 99 + "\n"


def note(lines: int) -> str:
    return f"{lines} lost\n"


def wait_until(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(write_end)


def read_all_that_comes(read_end: int) -> str:
    """Until nothing came for a while."""
    os.set_blocking(read_end, False)
    text, last = b"", time.monotonic()
    while time.monotonic() - last < 0.5:
        try:
            text += os.read(read_end, 65536)
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    return text.decode()


def test_texts_arrive_in_order_and_nothing_is_lost(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        outlet = Outlet(file.fileno(), note)
        for number in range(1000):
            assert outlet.write(f"{number}\n") == len(f"{number}\n")
        outlet.write("lone surrogate \udcff\n")
        outlet.close()
    assert (tmp_path / "log").read_text().splitlines() == [*map(str, range(1000)), r"lone surrogate \udcff"]


def test_a_reader_that_stops_blocks_nobody_and_is_told_what_it_missed(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    outlet = Outlet(write_end, note, capacity=CAPACITY)
    lost: list[int] = []
    outlet.on_lost = lost.append
    start = time.monotonic()
    for _ in range(10_000):
        outlet.write(LINE)
    assert time.monotonic() - start < PATIENCE
    assert sum(lost) > 1000
    lines = read_all_that_comes(read_end).splitlines()
    notes = [line for line in lines if line.endswith(" lost")]
    assert sum(int(line.split()[0]) for line in notes) == sum(lost)
    assert len(lines) - len(notes) + sum(lost) == 10_000
    outlet.write("afterwards\n")
    assert read_all_that_comes(read_end) == "afterwards\n"
    os.close(read_end)


def test_a_reader_that_went_away_is_counted_and_not_asked_again_and_again(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    os.close(read_end)
    outlet = Outlet(write_end, note)
    lost: list[int] = []
    outlet.on_lost = lost.append
    for _ in range(10):
        outlet.write(LINE)
    wait_until(lambda: sum(lost) == 10)
    outlet.close()
    assert sum(lost) == 10


def test_a_full_disk_loses_lines_and_then_says_so(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, (tmp_path / "log").open("wb") as file:
        descriptor = os.dup(full.fileno())
        outlet = Outlet(descriptor, note)
        lost: list[int] = []
        outlet.on_lost = lost.append
        outlet.write(LINE)
        wait_until(lambda: lost == [1])
        os.dup2(file.fileno(), descriptor)
        outlet.write("there is room again\n")
        outlet.close()
        os.close(descriptor)
    assert (tmp_path / "log").read_text() == "there is room again\n1 lost\n"


def test_a_descriptor_that_somebody_made_non_blocking(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    os.set_blocking(write_end, False)
    outlet = Outlet(write_end, note)
    for _ in range(2000):
        outlet.write(LINE)
    assert read_all_that_comes(read_end) == LINE * 2000
    outlet.close()
    os.close(read_end)


def test_the_last_words_of_the_program_do_not_wait_for_a_reader() -> None:
    code = (
        "import sys\n"
        "from pascaline.serving.outlet import Outlet\n"
        "outlet = Outlet(2, str)\n"
        "for _ in range(2000): outlet.write('x' * 99 + chr(10))\n"
        "outlet.close(0.2)\n"
        "print('y' * 100_000, file=sys.stderr)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(PATIENCE) == 0
