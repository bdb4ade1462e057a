"""The table of faults, row by row, each against a real instance on the fake engine; prints what was measured.

Beside it runs the soak (`benchmarks/soak.py`), which mostly waits, as the rows do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faults.scene import DEFAULT_STALL_SECONDS, Fault, Record, run, table
from faults.table import FAULTS
from pascaline.settings import Settings
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS_AT_ONCE = 6
"""Rows mostly wait, so more of them run at once than there are cores."""
SLOW = pytest.mark.slow("a few minutes: the whole table of faults")
MEASURED = Path(__file__).parents[2] / "docs/results/reliability.json"
SOAK = Path(__file__).parents[2] / "benchmarks/soak.py"
SOAK_SECONDS = 300


def _parameters() -> list[object]:
    return [pytest.param(fault, id=fault.name, marks=[] if fault.quick else [SLOW]) for fault in FAULTS]


@pytest.fixture(scope="module")
def soak(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str] | None]:
    """The running soak, started before the first row; None if its test is not selected."""
    if test_nothing_is_unexplained_and_nothing_grows.__name__ not in {item.name for item in request.session.items}:
        yield None
        return
    command = [sys.executable, str(SOAK), f"--seconds={SOAK_SECONDS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield process
        process.terminate()


@pytest.fixture(scope="module")
def records(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    soak: subprocess.Popen[str] | None,
) -> Iterator[dict[str, Future[Record]]]:
    """Run all selected rows at once, beside the soak; each test waits for its own."""
    model = write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny("llama"), "Q8_0")
    selected = [
        item.callspec.params["fault"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    runnable = [fault for fault in selected if fault.needs is None or not fault.needs()]
    with ThreadPoolExecutor(ROWS_AT_ONCE) as pool:
        started = {fault.name: pool.submit(run, fault, tmp_path_factory.mktemp("row"), model) for fault in runnable}
        yield started
        done = [future.result() for future in started.values() if future.done() and not future.exception()]
    print(f"\n{table(done)}")


@pytest.mark.parametrize("fault", _parameters())
def test_fault(fault: Fault, records: dict[str, Future[Record]]) -> None:
    if fault.name not in records:
        assert fault.needs is not None
        pytest.skip(fault.needs())
    record = records[fault.name].result()
    assert record.problems == [], f"{fault.name}: {record.ledger}\n{record.text[-3000:]}"


def test_the_table_is_whole() -> None:
    """At least eighty rows of different names, and no limit beyond a minute at the defaults for what stops answers."""
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 80
    for fault in FAULTS:
        if fault.stalls:
            assert fault.detect + DEFAULT_STALL_SECONDS - 3 <= 60, fault.name


def test_the_measured_table_is_whole() -> None:
    """docs/reliability.md is written from these rows: each fault is there, and none is detected late, or never."""
    rows = json.loads(MEASURED.read_text())["rows"]
    assert rows.keys() == {fault.name for fault in FAULTS}
    for name, row in rows.items():
        assert row["problems"] == [], name
        assert row["silent"] == 0, name
        assert (row["detected"] is None) == (row["outcome"] == "stays"), name
        if row["outcome"] == "recovers":
            assert row["by_default"] <= 60, name
            assert row["recovered"] is not None or row["states"].endswith("failed"), name


def test_the_page_shows_what_was_measured() -> None:
    """docs/reliability.md is what `benchmarks/reliability.py page` prints."""
    command = [sys.executable, str(SOAK.with_name("reliability.py")), "page", str(MEASURED)]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = (MEASURED.parents[1] / "reliability.md").read_text()
    assert page == shown, f"run: ./dev exec python benchmarks/reliability.py page {MEASURED} > docs/reliability.md"


def test_the_real_engines_are_beside_it() -> None:
    """Faults done to SGLang itself, under pascaline and bare; under pascaline each is found in time, and none is lost.

    A minute on an idle machine; a loaded one is given what `support.ledger.stretch` gives it.
    """
    rows = json.loads(MEASURED.read_text())["real"]["rows"]
    assert len([row for row in rows.values() if {"pascaline", "bare SGLang"} <= row.keys()]) >= 8
    for name, row in rows.items():
        if (found := row.get("pascaline")) is not None:
            assert found["recovered"] is not None, name
            assert found["unhealthy"] is None or found["unhealthy"] <= 60 * max(1.0, found["load"] / 4), name
            assert (found["problem"], found["silent"]) == ("", 0), name


def test_the_default_is_the_settings() -> None:
    assert Settings().stall_timeout == DEFAULT_STALL_SECONDS


@pytest.mark.slow("five minutes, beside the table: mixed load with random faults")
def test_nothing_is_unexplained_and_nothing_grows(
    soak: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test of this file, since it waits. Its seed is printed: with it the same faults come again."""
    report, _ = soak.communicate(timeout=590)
    with capsys.disabled():
        print(f"\n{report}")
    assert soak.returncode == 0, report
