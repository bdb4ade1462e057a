"""Captures of cards, replayed by the fake NVML, against whole pages: a change of any series shows up as a difference.

After an intended change: python tests/gpu/test_golden.py --update
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pascaline.gpu.fake_nvml import fake_nvml_environment
from pascaline.gpu.processes import ProcessIdentity
from pascaline.gpu.reader import Reader
from pascaline.gpu.render import metric_catalogue, render

HERE = Path(__file__).parent
CAPTURES = sorted((HERE / "captures").glob("*.nvml"))
CONTRACT = HERE / "contract.json"
HOW_TO_UPDATE = "if this is meant: python tests/gpu/test_golden.py --update, and change rules and dashboards with it"


def replayed(capture: Path) -> str:
    """Return the page of a capture, with what differs from run to run set to fixed values."""
    with Reader(environment=fake_nvml_environment(capture), start_deadline=120) as reader:
        reading = reader.read()
    fixed = replace(reading, timestamp=0.0, duration=0.0, last_success_timestamp=0.0)
    return render(fixed, lambda pid: ProcessIdentity(f"process-{pid}", "pascaline-demo.service"))


def contract() -> str:
    return json.dumps(metric_catalogue(), indent=2) + "\n"


def golden_of(capture: Path) -> Path:
    return HERE / "golden" / f"{capture.stem}.prom"


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda path: path.stem)
def test_a_replayed_capture_gives_its_golden_page(capture: Path) -> None:
    wanted, got = golden_of(capture).read_text().splitlines(), replayed(capture).splitlines()
    assert got == wanted, "\n".join([HOW_TO_UPDATE, *difflib.unified_diff(wanted, got, "golden", "now", lineterm="")])


def test_every_golden_page_has_its_capture() -> None:
    assert {path.stem for path in (HERE / "golden").glob("*.prom")} == {path.stem for path in CAPTURES}


def test_names_types_and_labels_are_the_contract() -> None:
    """Rules, dashboards and users' queries use these names: a change fails this test."""
    assert contract() == CONTRACT.read_text(), HOW_TO_UPDATE


def test_the_contract_holds_the_names_of_the_guide() -> None:
    wanted = {
        f"nvidia_gpu_{name}": {"type": "gauge", "labels": ["gpu", "uuid"]}
        for name in ("memory_used_bytes", "memory_total_bytes", "utilization_gpu", "temperature_gpu", "power_draw")
    }
    known = json.loads(CONTRACT.read_text())
    assert {name: {key: known[name][key] for key in ("type", "labels")} for name in wanted} == wanted


def update() -> None:
    CONTRACT.write_text(contract())
    for capture in CAPTURES:
        golden_of(capture).write_text(replayed(capture))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", required=True, help="write golden pages and contract anew")
    parser.parse_args()
    update()
    sys.exit(0)
