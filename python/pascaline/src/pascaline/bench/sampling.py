"""Reads the machine during a run: GPUs by NVML or an exporter's page, the engine's main memory by /proc."""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pascaline.bench.run_result import Sample
from pascaline.gpu.metrics import COMPUTE_PROCESSES, FAMILIES
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import DeviceStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pascaline.gpu.reading import DeviceReading

INTERVAL_SECONDS = 0.5
PAGE_TIMEOUT_SECONDS = 2.0
# Field of a Sample -> metric of the exporter, and the factor from the metric to the field.
_SERIES = {
    "gpu_memory_bytes": ("nvidia_gpu_memory_used_bytes", 1.0),
    "gpu_utilization_ratio": ("nvidia_gpu_utilization_gpu", 0.01),
    "power_watts": ("nvidia_gpu_power_draw", 1.0),
}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_READERS = {family.name: family.samples[0].value for family in FAMILIES if family.samples}


class GpuSource(Protocol):
    """Something that reports the state of a GPU."""

    def read(self, pids: Sequence[int]) -> dict[str, float]:
        """Return fields of a Sample. pids: the engine's processes, which show the GPU to read."""

    def close(self) -> None:
        """Release what the source holds."""


class LocalGpu:
    """NVML on this machine."""

    def __init__(self) -> None:
        """Read nothing before the first `read`."""
        self._reader = Reader()

    def read(self, pids: Sequence[int]) -> dict[str, float]:
        """Read the GPUs that the engine uses, added up; if they cannot be found, the first GPU."""
        devices = [device for device in self._reader.read().devices if device.status is DeviceStatus.OK]
        used = [device for device in devices if _processes(device) & set(pids)] or devices[:1]
        readings = [_device_fields(device) for device in used]
        return _together(readings)

    def close(self) -> None:
        """End the process that calls NVML."""
        self._reader.close()


class ExporterGpu:
    """The page of `pascaline exporter`, for a server on another machine."""

    def __init__(self, url: str) -> None:
        """url: address of the page."""
        self._url = url

    def read(self, pids: Sequence[int]) -> dict[str, float]:  # noqa: ARG002 - another machine's processes
        """Read the first GPU of the page; return nothing if the page cannot be read."""
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self._url, timeout=PAGE_TIMEOUT_SECONDS) as answer:
                page = answer.read().decode()
        except (OSError, http.client.HTTPException):
            return {}
        found = {}
        for key, (name, factor) in _SERIES.items():
            if match := re.search(rf"^{name}\{{[^}}]*\}} ([0-9.e+]+)$", page, re.MULTILINE):
                found[key] = float(match[1]) * factor
        return found

    def close(self) -> None:
        """Hold nothing."""


class Sampler:
    """Reads in a thread until its block ends. A source that fails loses its values, never the run."""

    def __init__(self, gpu: GpuSource | None, engine_pid: Callable[[], int | None]) -> None:
        """engine_pid: returns the engine's first process. It is called each time, because an engine may restart."""
        self._gpu = gpu
        self._engine_pid = engine_pid
        self._began = 0.0
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        self._began = time.perf_counter()
        self._samples = []
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def samples(self) -> list[Sample]:
        """The samples since the block was last entered."""
        return self._samples

    def _work(self) -> None:
        while True:
            pids = family(self._engine_pid())
            gpu = self._gpu.read(pids) if self._gpu is not None else {}
            at = time.perf_counter() - self._began
            self._samples.append(Sample(at, **gpu, host_memory_bytes=host_memory_bytes(pids)))
            if self._stop.wait(INTERVAL_SECONDS):
                return


def family(pid: int | None, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and its descendants; empty if there are none."""
    if pid is None:
        return []
    tasks = (proc / str(pid) / "task").glob("*/children")
    children = [int(child) for task in tasks for child in _words(task)]
    return [pid, *(member for child in children for member in family(child, proc))]


def host_memory_bytes(pids: Iterable[int], proc: Path = Path("/proc")) -> float | None:
    """Return the resident memory of the processes together; None if none can be read.

    Memory that they may share (files, shared memory) counts once, as the largest share of any one process. The kernel's
    exact account (smaps_rollup) would take tens of milliseconds a reading.
    """
    resident = [
        tuple(int(word) * _PAGE_BYTES for word in words[1:3])
        for pid in pids
        if (words := _words(proc / str(pid) / "statm"))
    ]
    if not resident:
        return None
    return float(sum(total - shared for total, shared in resident) + max(shared for _, shared in resident))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _processes(device: DeviceReading) -> set[int]:
    processes: Any = device.values.get(COMPUTE_PROCESSES.key)
    return {pid for pid, _ in processes} if isinstance(processes, list) else set()


def _device_fields(device: DeviceReading) -> dict[str, float]:
    found = {}
    for key, (name, factor) in _SERIES.items():
        value = _READERS[name](device.values)
        if value is not None:
            found[key] = value * factor
    return found


def _together(readings: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add the memory and power of several GPUs; utilisation is their mean."""
    if not readings:
        return {}
    keys = set.intersection(*map(set, readings))
    total = {key: sum(reading[key] for reading in readings) for key in keys}
    if "gpu_utilization_ratio" in total:
        total["gpu_utilization_ratio"] /= len(readings)
    return total
