"""The table of faults, row by row, each against a real instance on the fake engine; prints what was measured."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
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


def _parameters() -> list[object]:
    return [pytest.param(fault, id=fault.name, marks=[] if fault.quick else [SLOW]) for fault in FAULTS]


@pytest.fixture(scope="module")
def records(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Record]]]:
    """Run all selected rows at once; each test waits for its own."""
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


def test_the_default_is_the_settings() -> None:
    assert Settings().stall_timeout == DEFAULT_STALL_SECONDS
