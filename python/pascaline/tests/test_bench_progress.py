"""What a person sees while a benchmark runs."""

from __future__ import annotations

import io

from pascaline.bench.load import Record
from pascaline.bench.progress import Progress
from pascaline.bench.run_result import Run

RUN = Run(
    seed="1",
    started=0.0,
    seconds=2.0,
    cpu_seconds=0.0,
    records=[Record(0.0, 10, output_tokens=20, ttft=0.5, e2e=1.0, itl=[0.1] * 5), Record(0.0, 10, error="refused")],
    samples=[],
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_run_is_a_line_and_nothing_else() -> None:
    stream = io.StringIO()
    progress = Progress(2, stream)
    progress.waiting(0.0, "starting")
    progress.waiting(1.0, "starting")
    progress.waiting(2.0, "ready")
    progress.running("batch 1: 1 of 8 requests", 0.125)
    progress.finished("batch 1, run 1 of 2", RUN)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "starting the instance: starting",
        "starting the instance: ready",
        "batch 1, run 1 of 2: output throughput 10.0 tok/s, TTFT p50 500.0 ms, ITL p50 100.0 ms, errors 50.0 %",
    ]


def test_on_a_terminal_one_line_is_renewed_in_place() -> None:
    stream = Terminal()
    progress = Progress(4, stream)
    progress.running("batch 1: 4 of 8 requests", 0.5)
    assert stream.getvalue() == "\r\033[K███·····················  12%  batch 1: 4 of 8 requests"
    # Too soon: drawing is part of the CPU time that is measured.
    progress.running("batch 1: 5 of 8 requests", 0.625)
    assert stream.getvalue().endswith("batch 1: 4 of 8 requests")
    progress.finished("batch 1, run 1 of 4", RUN)
    assert stream.getvalue().endswith("██████··················  25%  batch 1: 5 of 8 requests")
    progress.close()
    assert stream.getvalue().endswith("\r\033[K")


def test_runs_that_are_there_already_count_as_done() -> None:
    stream = Terminal()
    progress = Progress(4, stream)
    progress.skipped(3)
    progress.running("batch 8: warm-up", 0.0)
    assert "  75%  batch 8: warm-up" in stream.getvalue()
