"""What is shown of an instance, where somebody looks and where nobody does any more."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import pytest
from pascaline.serving.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w", buffering=1)
    yield stream
    # The interpreter does the same at its end.
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_lines_and_stages() -> None:
    stream = io.StringIO()
    console = Console(stream)
    with console.stage("load") as stage:
        stage.note = ": it is there"
    with console.stage("warm-up") as stage:
        stage.failed = True
    console.line("WARNING", "engine", "hot")
    first, second, _, failed, last = stream.getvalue().splitlines()
    assert first == "INFO    pascaline: load …"
    assert second == "INFO    pascaline: load done in 0.0 s: it is there"
    assert failed == "ERROR   pascaline: warm-up failed after 0.0 s"
    assert last == "WARNING engine: hot"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "shown"), [(io.StringIO, "x" * 15_000), (Terminal, "x" * 500 + "… (15,000 characters)")]
)
def test_a_very_long_line_does_not_fill_a_terminal(kind: type[io.StringIO], shown: str) -> None:
    stream = kind()
    Console(stream).line("INFO", "engine", "x" * 15_000)
    assert stream.getvalue() == f"INFO    engine: {shown}\n"


def test_a_running_stage_is_one_line_that_is_renewed() -> None:
    stream = Terminal()
    console = Console(stream)
    with console.stage("verify") as stage:
        stage.progress(1, 2)
        console.line("ERROR", "engine", "hot")
    clear = "\r\033[K"
    assert stream.getvalue() == (
        f"… verify 0 s {clear}… verify 0 s ██████████··········  50%"
        f"{clear}\033[31mERROR   engine: hot\033[0m\n… verify 0 s ██████████··········  50%"
        f"{clear}INFO    pascaline: verify done in 0.0 s\n"
    )


def test_a_reader_that_went_away_stops_nothing(unread: TextIO) -> None:
    console = Console(unread)
    with console.stage("load") as stage:
        stage.progress(1, 2)
    for _ in range(1000):
        console.line("INFO", "engine", "x" * 1000)
