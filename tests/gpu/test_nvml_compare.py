"""The comparison with nvidia-smi covers every series, and distinguishes agreement from disagreement."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.gpu.fake_nvml import fake_nvml_environment
from pascaline.gpu.metrics import FAMILIES, PREFIX

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/nvml_compare.py"
CAPTURE = Path(__file__).parent / "captures/nvidia-h100-80gb-hbm3.nvml"
COMPARE = runpy.run_path(str(SCRIPT))
# What nvidia-smi printed for an H100 with driver 580 at its power limit, as far as it is not zero, off or absent.
PRINTED = {
    "memory.total": "81559",
    "memory.used": "1139",
    "memory.free": "79941",
    "memory.reserved": "480",
    "utilization.gpu": "100",
    "power.limit": "700.00",
    "enforced.power.limit": "700.00",
    "clocks_throttle_reasons.sw_power_cap": "Active",
    "clocks_throttle_reasons.sync_boost": "Not Active",
    "ecc.errors.corrected.volatile.sram": "0",
    "ecc.errors.corrected.volatile.l1_cache": "[N/A]",
    "remapped_rows.pending": "No",
    "name": "NVIDIA H100 80GB HBM3",
    "driver_version": "580.159.04",
    "compute_cap": "9.0",
}
SMI = """#!/bin/sh
for argument; do case $argument in --query-gpu=*) fields=${argument#*=} ;; esac; done
IFS=,
for field in $fields; do
  read -r text <"${0%/*}/printed/$field" || exit 1
  answer="$answer${answer:+, }$text"
done
echo "$answer"
"""


def samples() -> list[tuple[str, dict[str, str]]]:
    return [(f.name.removeprefix(PREFIX), dict(sample.labels)) for f in FAMILIES for sample in f.samples]


@pytest.mark.parametrize(("series", "labels"), samples(), ids=str)
def test_every_series_is_compared_or_is_one_that_nvidia_smi_does_not_print(series: str, labels: dict[str, str]) -> None:
    compared = any(row.series == series and row.labels == labels for row in COMPARE["ROWS"])
    without = COMPARE["NOT_QUERIED"].get(series)
    assert compared != (without is not None and without in ("", *labels.values()))


def compared_with(printed: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script on a recorded H100 beside a program that prints what its nvidia-smi did; without torch, no load."""
    (folder / "printed").mkdir()
    for field, text in printed.items():
        (folder / "printed" / field).write_text(f"{text}\n")
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    (folder / "torch.py").write_text("raise ImportError\n")
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    command = [sys.executable, str(SCRIPT), f"--output={folder}"]
    environment = fake_nvml_environment(CAPTURE) | paths
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def recorded() -> dict[str, str]:
    lines = dict(line.split(" = ", 1) for line in CAPTURE.read_text().splitlines() if " = " in line)
    texts = {
        "uuid": lines["nvmlDeviceGetUUID"],
        "serial": lines["nvmlDeviceGetSerial"],
        "pci.bus_id": lines["nvmlDeviceGetPciInfo"],
        "vbios_version": lines["nvmlDeviceGetVbiosVersion"],
    }
    return PRINTED | texts


def test_equal_values_are_a_table_and_success(tmp_path: Path) -> None:
    done = compared_with(recorded(), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "nvml-nvidia-h100-80gb-hbm3.md").read_text()
    assert "Texts that are equal: name, serial, pci.bus_id, vbios_version, compute_cap, uuid, driver_version." in page
    assert '| `power.limit` | `power_limit_watts{limit="management"}` | 10 of 10 |' in page
    assert "| absent on both sides (10) |" in page
    assert recorded()["uuid"] not in page


def test_values_that_differ_are_named_and_a_failure(tmp_path: Path) -> None:
    changed = {"power.limit": "650.00", "ecc.errors.corrected.volatile.sram": "[N/A]", "vbios_version": "1"}
    done = compared_with(recorded() | changed, tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "texts differ: vbios_version",
        "idle: power.limit: 650, 650 / 700",
        "idle: ecc.errors.corrected.volatile.sram: absent, absent / 0",
    ]
