"""Shows where the time of a test run goes: a table by area, and the seconds per file that order the next run.

    ./dev test --all --junitxml times.xml
    PYTEST_ADDOPTS=--junitxml=fast.xml ./dev test
    ./dev exec python benchmarks/test_times.py times.xml [fast.xml]

Writes docs/results/tests.json, which tests/support/selection.py reads to start the longest files first, and
docs/results/tests.md. Exit codes: 0 written, 2 a file is not a JUnit report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
FOLDERS = (ROOT, ROOT / "python", ROOT / "tests")
"""Folders to which pytest's file names are relative, depending on how it was called."""


@dataclass
class Run:
    """One run of the tests."""

    wall_seconds: float
    seconds: Counter[str]
    """Seconds by file, as a path in the repository: set-up and tear-down included, all workers together."""
    tests: Counter[str]
    """Number of passed, skipped and failed tests."""


def read(path: Path) -> Run:
    """Read a JUnit report."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    suite = ElementTree.parse(path).getroot().find("testsuite")
    if suite is None:
        raise ElementTree.ParseError("no testsuite")
    for case in suite.iter("testcase"):
        seconds[file_of(case.get("classname", ""))] += float(case.get("time", 0))
        outcomes = {child.tag for child in case}
        tests["failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"] += 1
    return Run(float(suite.get("time", 0)), seconds, tests)


def file_of(classname: str) -> str:
    """Return the test file of a dotted name such as `pascaline.tests.test_cards.TestCards`, or the name itself."""
    parts = classname.split(".")
    for length in range(len(parts), 0, -1):
        name = "/".join(parts[:length]).lstrip("/") + ".py"
        for folder in FOLDERS:
            if (folder / name).is_file():
                return str((folder / name).relative_to(ROOT))
    return classname


def area(file: str) -> str:
    """Return the folder as a person names it: tests/serve, python/pascaline/tests, …/tests/engine."""
    return str(Path(file).parent)


def page(runs: dict[str, Run]) -> str:
    """Return docs/results/tests.md."""
    lines = [
        "# Time of the tests",
        "",
        f"Made by `benchmarks/test_times.py` on {date.today()}: {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.",
        "Seconds of all workers together, set-up included; the last row is what a person waits for.",
        "",
        "| area | " + " | ".join(f"`{name}`" for name in runs) + " |",
        "|---|" + "---|" * len(runs),
    ]
    by_area = {name: Counter[str]() for name in runs}
    for name, run in runs.items():
        for file, seconds in run.seconds.items():
            by_area[name][area(file)] += seconds
    places = sorted(set().union(*by_area.values()), key=lambda place: -max(each[place] for each in by_area.values()))
    lines += [row(place, [f"{seconds[place]:.0f}" for seconds in by_area.values()]) for place in places]
    lines.append(row("tests", [", ".join(f"{n} {kind}" for kind, n in run.tests.items()) for run in runs.values()]))
    lines.append(row("wall time", [f"{run.wall_seconds:.0f}" for run in runs.values()]))
    return "\n".join(lines) + "\n"


def row(name: str, cells: list[str]) -> str:
    """Return a row of the table."""
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> int:
    """Read the reports and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("all", type=Path, help="JUnit report of ./dev test --all")
    parser.add_argument("fast", type=Path, nargs="?", help="JUnit report of ./dev test")
    arguments = parser.parse_args()
    try:
        runs = {"./dev test --all": read(arguments.all)}
        if arguments.fast:
            runs["./dev test"] = read(arguments.fast)
    except (OSError, ElementTree.ParseError) as error:
        print(f"test_times: error: {error}", file=sys.stderr)
        return 2
    # Also those of no time at all: a file without a time counts as a long one.
    of_run = {"all": runs["./dev test --all"], "fast": runs.get("./dev test", runs["./dev test --all"])}
    seconds = {
        name: {file: round(time, 1) for file, time in sorted(run.seconds.items())} for name, run in of_run.items()
    }
    (RESULTS / "tests.json").write_text(json.dumps({"seconds_by_file": seconds}, indent=1) + "\n")
    (RESULTS / "tests.md").write_text(page(runs))
    print(page(runs), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
