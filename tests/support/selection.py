"""Which tests run, on which worker and in what order, and what is said at the end of those that did not run.

A pytest plugin (`-p support.selection` in python/pyproject.toml). Three rules:

- `--fast` leaves out what is marked `slow`, and the summary counts it by the marker's reason.
- With pytest-xdist, the tests of a file share a worker, as its fixtures are made once; tests that start a real engine
  share one worker, as each needs both cores and gigabytes of memory.
- Files start in the order of their recorded time, longest first, so that no worker ends with a long one.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

ROOT = Path(__file__).parents[2]
TIMES = ROOT / "docs/results/tests.json"
"""Seconds by test file, written by benchmarks/test_times.py."""
_left_out = pytest.StashKey[Counter[str]]()
_OUTPUT_KEY = "left_out"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --fast."""
    parser.addoption("--fast", action="store_true", help="leave out the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Make room for what is left out."""
    config.stash[_left_out] = Counter()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, object, object]:
    """Leave out, group, and order the collected tests in place.

    A wrapper, to be before pytest-xdist, which takes the groups into the names of the tests here.
    """
    if config.option.fast:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.stash[_left_out].update(_reason(item) for item in slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items[:] = _longest_first(items)
    return (yield)


def _reason(item: pytest.Item) -> str:
    marker = item.get_closest_marker("slow")
    assert marker is not None
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{item.nodeid}: the marker slow takes one argument, the reason")
    return str(marker.args[0])


def _group(item: pytest.Item) -> str:
    return "engine" if item.get_closest_marker("engine") else _file(item)


def _file(item: pytest.Item) -> str:
    return str(item.path.relative_to(ROOT)) if item.path.is_relative_to(ROOT) else item.path.name


def _longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Sort groups by their recorded time; the tests of a group keep their order."""
    seconds = _recorded_seconds()
    items = list(items)
    total: Counter[str] = Counter()
    for group, file in {(_group_of(item), _file(item)) for item in items}:
        total[group] += seconds.get(file, 0.0)
    first = {group: index for index, group in reversed(list(enumerate(map(_group_of, items))))}
    return sorted(items, key=lambda item: (-total[_group_of(item)], first[_group_of(item)]))


def _group_of(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])


def _recorded_seconds() -> dict[str, float]:
    if not TIMES.is_file():
        return {}
    recorded: dict[str, float] = json.loads(TIMES.read_text())["seconds_by_file"]
    return recorded


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker left out to the controller; all workers collect the same tests."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT_KEY] = dict(session.config.stash[_left_out])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over what a worker left out."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_left_out] |= Counter(output.get(_OUTPUT_KEY, {}))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and why; pytest's own summary says what was skipped."""
    left_out = config.stash[_left_out]
    if not left_out:
        return
    terminalreporter.section(f"{left_out.total()} tests left out (./dev test --all runs them)")
    for reason, count in left_out.most_common():
        terminalreporter.line(f"{count:4} {reason}")
