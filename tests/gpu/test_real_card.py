"""The exporter on a real NVIDIA GPU; skipped without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import DriverStatus

if TYPE_CHECKING:
    from pascaline.gpu.reading import Reading

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no nvidia-smi on PATH: this host has no NVIDIA driver"),
]
PATIENCE = 60.0


@pytest.fixture(scope="module")
def reading() -> Reading:
    """One reading of the real driver."""
    with Reader() as reader:
        return reader.read()


def test_the_driver_answers(reading: Reading) -> None:
    """Every GPU that nvidia-smi lists is there, with its UUID."""
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    assert reading.status is DriverStatus.OK, reading.message
    assert [device.uuid for device in reading.devices] == listed.stdout.split()


def test_memory_adds_up(reading: Reading) -> None:
    """Total is reserved, free and used together."""
    for device in reading.devices:
        total, *parts = device.values["nvmlDeviceGetMemoryInfo_v2"]
        assert total == sum(parts)


def test_values_are_plausible(reading: Reading) -> None:
    """Units are right: a temperature in degrees and a power in milliwatts."""
    for device in reading.devices:
        assert 10 <= device.values["nvmlDeviceGetTemperature 0"] <= 110
        assert 3_000 <= device.values["nvmlDeviceGetPowerUsage"] <= 1_500_000


def test_a_killed_child_is_replaced() -> None:
    """The death of the process that holds NVML costs one reading."""
    with Reader(recheck=0.1) as reader:
        assert reader.read().succeeded
        assert reader._child is not None
        reader._child.process.kill()
        reader._child.process.wait()
        assert reader.read().status is DriverStatus.CRASHED
        deadline = time.monotonic() + PATIENCE
        while not (again := reader.read()).succeeded:
            assert time.monotonic() < deadline, again.message
            time.sleep(0.05)
        assert again.reader_starts == 2


def test_a_scrape_over_http_gives_the_names_of_the_guide() -> None:
    """The whole way, from the command line to the page."""
    command = [sys.executable, "-m", "pascaline", "exporter", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as exporter:
        try:
            assert exporter.stderr is not None
            url = exporter.stderr.readline().split()[-1]
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                page = answer.read().decode()
        finally:
            exporter.terminate()
            exporter.stderr.read()
    for name in ("memory_used_bytes", "memory_total_bytes", "utilization_gpu", "temperature_gpu", "power_draw"):
        assert f'\nnvidia_gpu_{name}{{gpu="0",uuid="GPU-' in page
