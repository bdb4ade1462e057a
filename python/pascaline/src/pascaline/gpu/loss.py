"""Whether a GPU is lost, judged by evidence: what NVML reports now, and what the driver wrote to the kernel's log.

    evidence                                                                standing
    NVML reads the GPU                                                      well
    NVML returns GPU_IS_LOST or RESET_REQUIRED, a call about it hangs,      lost
    its UUID is no longer listed, the kernel module is gone, Xid 79
    NVML hangs elsewhere, an Xid after which the GPU must be reset          doubtful
    NVML cannot be asked, the log cannot be read, nothing about this GPU    unknown

An index identifies no card here: after a card is lost, another card may have its index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from pascaline.gpu.kernel_log import OFF_THE_BUS, RESET_XIDS, driver_lines, xid_events
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import DeviceStatus, DriverStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pascaline.gpu.devices import GpuIdentity
    from pascaline.gpu.kernel_log import XidEvent
    from pascaline.gpu.reading import DeviceReading, Reading


class Standing(StrEnum):
    """Condition of an instance's GPUs according to the evidence, from the best to the worst."""

    WELL = "well"
    UNKNOWN = "unknown"
    DOUBTFUL = "doubtful"
    """Something is wrong with GPU or driver: counts together with an engine that failed in CUDA or fell silent."""
    LOST = "lost"

    @property
    def severity(self) -> int:
        """0 for well, growing."""
        return list(Standing).index(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The state of a GPU and the observation behind it."""

    standing: Standing
    text: str = ""


NOTHING_KNOWN = Evidence(Standing.UNKNOWN)
_GONE = frozenset({DeviceStatus.LOST, DeviceStatus.RESET_REQUIRED, DeviceStatus.HUNG})


def examine(gpus: Sequence[GpuIdentity], since: float, environment: Mapping[str, str] | None = None) -> Evidence:
    """Ask NVML, in a process that is killed if it hangs, and the kernel's log since that Unix time, about these GPUs.

    Blocks for at most half a minute. environment: of the process that asks NVML (None = this one's).
    """
    if not gpus:
        return NOTHING_KNOWN
    with Reader(environment=environment) as reader:
        reading = reader.read()
    return judge(gpus, reading, driver_lines(since) or ())


def judge(gpus: Sequence[GpuIdentity], reading: Reading, kernel_lines: Iterable[str] = ()) -> Evidence:
    """Return the worst state of the GPUs. A GPU that NVML can read now is well, even if the log has errors."""
    events = xid_events(kernel_lines)
    found = [_judge_one(gpu, reading, events) for gpu in gpus]
    return max(found, key=lambda evidence: evidence.standing.severity, default=NOTHING_KNOWN)


def _judge_one(gpu: GpuIdentity, reading: Reading, events: Sequence[XidEvent]) -> Evidence:
    by_nvml = _by_nvml(gpu, reading)
    if by_nvml.standing is Standing.LOST:
        return by_nvml
    by_kernel = _by_kernel(gpu, events)
    if by_nvml.standing is Standing.WELL or by_kernel is NOTHING_KNOWN:
        return _with_last_event(by_nvml, gpu, events)
    return max((by_nvml, by_kernel), key=lambda evidence: evidence.standing.severity)


def _with_last_event(evidence: Evidence, gpu: GpuIdentity, events: Sequence[XidEvent]) -> Evidence:
    """Add the GPU's last Xid: an application's own error (13, 31), or what the GPU has recovered from."""
    own = [event.line for event in events if gpu.address and event.address == gpu.address]
    if not own:
        return evidence
    text = f"the kernel's log says: {own[-1]}"
    return replace(evidence, text=f"{evidence.text}; {text}" if evidence.text else text)


def _by_nvml(gpu: GpuIdentity, reading: Reading) -> Evidence:
    if device := _find(gpu, reading.devices):
        return _by_device(gpu, device)
    if reading.succeeded:
        return Evidence(Standing.LOST, f"NVML no longer lists {gpu}")
    if reading.status is DriverStatus.NO_DRIVER:
        return Evidence(Standing.LOST, "the driver's kernel module is no longer loaded")
    if reading.status is DriverStatus.HUNG:
        return Evidence(Standing.DOUBTFUL, f"NVML hangs: {reading.message}")
    return Evidence(Standing.UNKNOWN, reading.message)


def _find(gpu: GpuIdentity, devices: Sequence[DeviceReading]) -> DeviceReading | None:
    """Return what NVML reports about the GPU, found by its UUID, or by its index if the device reports no UUID."""
    known = next((device for device in devices if device.uuid and device.uuid == gpu.uuid), None)
    return known or next((device for device in devices if not device.uuid and device.index == gpu.index), None)


def _by_device(gpu: GpuIdentity, device: DeviceReading) -> Evidence:
    if device.status is DeviceStatus.OK:
        return Evidence(Standing.WELL, f"NVML reads {gpu}")
    standing = Standing.LOST if device.status in _GONE else Standing.UNKNOWN
    return Evidence(standing, f"NVML finds {gpu} {device.status.value.replace('_', ' ')}: {device.message}")


def _by_kernel(gpu: GpuIdentity, events: Sequence[XidEvent]) -> Evidence:
    own = [event for event in events if gpu.address and event.address == gpu.address]
    for event in reversed(own):
        if event.number == OFF_THE_BUS:
            return Evidence(Standing.LOST, f"the kernel's log says: {event.line}")
    for event in reversed(own):
        if event.number in RESET_XIDS:
            return Evidence(Standing.DOUBTFUL, f"the kernel's log says: {event.line}")
    return NOTHING_KNOWN
