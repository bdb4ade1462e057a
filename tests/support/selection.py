"""Which tests run, on which worker and in what order, and what is said at the end of those that did not run.

A pytest plugin (`-p support.selection` in python/pyproject.toml). Three rules:

- `--fast` leaves out what is marked `slow`, and the summary counts it by the marker's reason. Property tests try fewer
  examples with it.
- With pytest-xdist, the tests of a file share a worker, as its fixtures are made once; tests that start a real engine
  share two workers, as each needs a core and gigabytes of memory; files that run scripts in the fixture `in_sglang`
  share one, and those that import SGLang themselves another, as an import takes ten seconds of a core.
- Files start in the order of their recorded time in this kind of run, longest first, so that no worker ends with a long
  one. A file without a record may be a long one.
"""

from __future__ import annotations

import functools
import gc
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
TIMES = ROOT / "docs/results/tests.json"
"""Seconds by test file of both kinds of runs, written by benchmarks/test_times.py."""
ENGINES_AT_ONCE = 2
ONE_ENGINE_FOLDER = "engine"
"""Name of a folder whose files share an engine, and so a worker."""
UNKNOWN_ENGINE_SECONDS = 240.0
"""Assumed of a file with a real engine whose time is not recorded yet."""
UNKNOWN_SECONDS = 30.0
"""The same of another file."""
FAST_EXAMPLES = 30
"""Of a property test that names no number, with --fast; else hypothesis' own, 100."""
IN_SGLANG = "in_sglang"
"""Group of the files that use the fixture of this name."""
IMPORTS_SGLANG = "imports_sglang"
"""Group of the files whose tests have the marker of this name."""
_left_out = pytest.StashKey[Counter[str]]()
_OUTPUT_KEY = "left_out"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --fast."""
    parser.addoption("--fast", action="store_true", help="leave out the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """Make room for what is left out."""
    config.stash[_left_out] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without the garbage collector: it would look again and again at thousands of tests that all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """Set up hypothesis, which is imported only where it is used."""
    if "hypothesis" in module_path.read_text():
        _set_up_hypothesis(fast=parent.config.option.fast)


@functools.cache
def _set_up_hypothesis(*, fast: bool) -> None:
    """Let no property test fail for its time on a busy machine; the fast run tries fewer examples."""
    import hypothesis

    examples = FAST_EXAMPLES if fast else hypothesis.settings.default.max_examples
    hypothesis.settings.register_profile("tests", deadline=None, max_examples=examples)
    hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out and order the collected tests in place."""
    if config.option.fast:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.stash[_left_out].update(_reason(item) for item in slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = _longest_first(items, _recorded_seconds("fast" if config.option.fast else "all"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole groups of tests, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return GroupScheduling(config, log)


@functools.cache
def group_of(file: str) -> str:
    """Return the group of a test file, named from `python` or `tests`: itself, or that of its real engine."""
    found = next((folder / file for folder in (ROOT / "python", ROOT / "tests") if (folder / file).is_file()), None)
    if found is None:
        return file
    name = str(found.relative_to(ROOT))
    if name in _engine_groups():
        return _engine_groups()[name]
    text = found.read_text()
    if f"pytest.mark.{IMPORTS_SGLANG}" in text:
        return IMPORTS_SGLANG
    return IN_SGLANG if any(f"({IN_SGLANG}{end}" in text for end in "):") else name


@functools.cache
def _engine_groups() -> dict[str, str]:
    """Divide the files whose tests start a real engine into ENGINES_AT_ONCE groups of about the same time."""
    folders = (*ROOT.glob("python/*/tests"), ROOT / "tests")
    names = (str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("**/test_*.py"))
    recorded, seconds, units = _recorded_seconds(), Counter[str](), {}
    for name in names:
        if "pytest.mark.engine" in (ROOT / name).read_text():
            units[name] = str(Path(name).parent) if Path(name).parent.name == ONE_ENGINE_FOLDER else name
            seconds[units[name]] += recorded.get(name, UNKNOWN_ENGINE_SECONDS)
    totals, group_of_unit = dict.fromkeys((f"engine {n}" for n in range(ENGINES_AT_ONCE)), 0.0), {}
    for unit in sorted(seconds, key=lambda unit: (-seconds[unit], unit)):
        group = min(totals, key=lambda each: totals[each])
        group_of_unit[unit] = group
        totals[group] += seconds[unit]
    return {name: group_of_unit[unit] for name, unit in units.items()}


def _reason(item: pytest.Item) -> str:
    marker = item.get_closest_marker("slow")
    assert marker is not None
    if len(marker.args) != 1:
        raise pytest.UsageError(f"{item.nodeid}: the marker slow takes one argument, the reason")
    return str(marker.args[0])


def _longest_first(items: list[pytest.Item], seconds: dict[str, float]) -> list[pytest.Item]:
    """Sort groups by the recorded time of their files; the tests of a group keep their order."""
    groups = [group_of(item.nodeid.partition("::")[0]) for item in items]
    total: Counter[str] = Counter()
    for group, file in {(group, item.path) for group, item in zip(groups, items, strict=True)}:
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
        total[group] += seconds.get(name, UNKNOWN_SECONDS)
    first = {group: index for index, group in reversed(list(enumerate(groups)))}
    order = sorted(range(len(items)), key=lambda index: (-total[groups[index]], first[groups[index]], index))
    return [items[index] for index in order]


def _recorded_seconds(run: str = "all") -> dict[str, float]:
    """Return seconds by file in a run of this kind: `all` or `fast`."""
    if not TIMES.is_file():
        return {}
    recorded: dict[str, dict[str, float]] = json.loads(TIMES.read_text())["seconds_by_file"]
    return recorded[run]


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
