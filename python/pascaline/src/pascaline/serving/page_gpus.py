"""What NVML says of the instance's GPUs, for the agent's page: read in a process of its own, and only while wanted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pascaline.gpu.metrics import FAMILIES, NAME, PREFIX
from pascaline.gpu.reader import Reader
from pascaline.serving.threads import start_in_thread

if TYPE_CHECKING:
    from collections.abc import Collection

    from pascaline.gpu.metrics import Sample
    from pascaline.gpu.reading import DeviceReading, Reading

READ_SECONDS = 2.0
"""Least time between two readings."""
UNWANTED_SECONDS = 30.0
"""Time without a page after which the process that calls NVML ends."""
HARMLESS = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting"})
"""Reasons for lower clocks that are no problem."""
_SAMPLES = {(family.name, sample.labels): sample for family in FAMILIES for sample in family.samples}
_REASONS = {labels[0][1]: sample for (name, labels), sample in _SAMPLES.items() if name == f"{PREFIX}throttle_reason"}


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU now, in the exporter's units; None: the card does not report it."""

    index: int
    name: str
    trouble: str
    """Why it cannot be read; empty if it answers."""
    temperature_celsius: float | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    clock_hertz: float | None = None
    utilization_percent: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    slowed_by: tuple[str, ...] = ()
    """What lowers the clocks now, except idleness and settings."""


def gpu_states(reading: Reading, uuids: Collection[str]) -> list[GpuState]:
    """Return the state of the GPUs with these UUIDs."""
    return [_state(device) for device in reading.devices if device.uuid in uuids]


def _state(device: DeviceReading) -> GpuState:
    def value(name: str, **labels: str) -> float | None:
        sample: Sample = _SAMPLES[PREFIX + name, tuple(labels.items())]
        return sample.value(device.values)

    return GpuState(
        index=device.index,
        name=str(device.values.get(NAME.key, "GPU")).removeprefix("NVIDIA "),
        trouble="" if device.values else f"{device.status}: {device.message}",
        temperature_celsius=value("temperature_gpu"),
        power_watts=value("power_draw"),
        power_limit_watts=value("power_limit_watts", limit="enforced"),
        clock_hertz=value("clock_hertz", clock="sm"),
        utilization_percent=value("utilization_gpu"),
        memory_used_bytes=value("memory_used_bytes"),
        memory_total_bytes=value("memory_total_bytes"),
        slowed_by=tuple(
            name for name, sample in _REASONS.items() if name not in HARMLESS and sample.value(device.values)
        ),
    )


class GpuWatch:
    """The last reading, renewed in a thread while it is asked for; never waits for the driver."""

    def __init__(self) -> None:
        """Start without a reading."""
        self._reader = Reader()
        self._last: Reading | None = None
        self._reading: asyncio.Future[Reading] | None = None
        self._asked_at = 0.0
        self._began_at = 0.0
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    def states(self, uuids: Collection[str]) -> list[GpuState]:
        """Return the newest states of these GPUs, and take another reading soon; none before the first reading."""
        if uuids and not self._closed:
            self._renew()
        return gpu_states(self._last, uuids) if self._last is not None else []

    def _renew(self) -> None:
        self._asked_at = now = time.monotonic()
        self._schedule_end()
        if self._reading is not None or now - self._began_at < READ_SECONDS:
            return
        self._began_at = now
        try:
            self._reading = start_in_thread(self._reader.read)
        except OSError:
            return  # no thread to be had; the next page tries again
        self._reading.add_done_callback(self._take)

    def _take(self, done: asyncio.Future[Reading]) -> None:
        self._reading = None
        if not done.cancelled() and done.exception() is None:
            self._last = done.result()

    def _schedule_end(self) -> None:
        if self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(UNWANTED_SECONDS, self._end_if_unwanted)

    def _end_if_unwanted(self) -> None:
        self._idle = None
        if time.monotonic() - self._asked_at < UNWANTED_SECONDS or self._reading is not None:
            self._schedule_end()
        else:
            # What it said is old by the time that another page asks.
            self._last = None
            self._reader.close()

    def close(self) -> None:
        """End the process that calls NVML, for good; the last reading stays."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        self._reader.close()
