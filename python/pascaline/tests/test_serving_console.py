"""What is shown of an instance, while a page is open and after it is closed."""

from __future__ import annotations

import io
import logging
import os
from typing import TYPE_CHECKING

import pytest
from pascaline.serving.console import Console, _ConsoleHandler
from pascaline.serving.repeats import REMEMBERED, SHOWN, WINDOW_SECONDS, Repeats

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
    for number in range(1000):
        console.line("INFO", "engine", f"{number}" * 1000)


def test_control_characters_are_shown_and_not_obeyed() -> None:
    stream = io.StringIO()
    Console(stream).line("INFO", "engine", "a\x1b[2Jb\r\x07\x9b1m\u202ec\td")
    assert stream.getvalue() == "INFO    engine: a\\x1b[2Jb\\r\\x07\\x9b1m\\u202ec\td\n"


def test_a_line_that_repeats_is_counted() -> None:
    now = [0.0]
    stream = io.StringIO()
    console = Console(stream, lambda: now[0])
    counted: list[int] = []
    console.on_repeated = counted.append
    for _ in range(SHOWN + 100):
        console.line("ERROR", "asyncio", "out of descriptors")
    console.line("INFO", "engine", "another")
    assert stream.getvalue().splitlines() == [
        *["ERROR   asyncio: out of descriptors"] * SHOWN,
        "INFO    engine: another",
    ]
    assert sum(counted) == 100
    now[0] = WINDOW_SECONDS
    console.settle()
    console.line("ERROR", "asyncio", "out of descriptors")
    assert stream.getvalue().splitlines()[SHOWN + 1 :] == [
        "WARNING asyncio: repeated 100 more times within 60 s: out of descriptors",
        "ERROR   asyncio: out of descriptors",
    ]


def test_not_more_lines_are_remembered_than_that() -> None:
    repeats: Repeats[int] = Repeats()
    for number in range(2 * REMEMBERED):
        for _ in range(SHOWN + 2):
            repeats.admits(number, 0.0)
    assert repeats.settled(0.0) == [(number, 2) for number in range(REMEMBERED)]


def test_what_libraries_log_comes_line_by_line() -> None:
    stream = io.StringIO()
    handler = _ConsoleHandler(Console(stream))
    record = logging.LogRecord("asyncio", logging.ERROR, "file", 1, "one\ntwo %s", ("x",), None)
    handler.emit(record)
    handler.emit(logging.LogRecord("asyncio", logging.ERROR, "file", 1, "%d", ("x",), None))
    assert stream.getvalue().splitlines() == [
        "ERROR   asyncio: one",
        "ERROR   asyncio: two x",
        "ERROR   asyncio: a record could not be formatted: '%d'",
    ]
