"""The result of one reading of NVML. Data and health are separate, so that neither is guessed from the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.gpu.calls import Raw


class DriverStatus(StrEnum):
    """How NVML as a whole answered."""

    OK = "ok"
    NO_DEVICES = "no_devices"
    """NVML works and counts no GPU."""
    STARTING = "starting"
    """No reading has ended yet."""
    NO_LIBRARY = "no_library"
    """libnvidia-ml.so.1 is not found."""
    NO_DRIVER = "no_driver"
    """The kernel module is not loaded."""
    NO_PERMISSION = "no_permission"
    VERSION_MISMATCH = "version_mismatch"
    """Library and kernel module are of different versions: the driver was upgraded and the host not restarted."""
    HUNG = "hung"
    """A call did not return by its deadline."""
    CRASHED = "crashed"
    """The process that called NVML died."""
    STALE = "stale"
    """The last reading is too old to be shown, and there is no newer one yet."""
    ERROR = "error"
    """Any other failure; the message has NVML's code."""


class DeviceStatus(StrEnum):
    """How one GPU answered."""

    OK = "ok"
    LOST = "lost"
    """NVML returns GPU_IS_LOST, or no longer counts a GPU that it counted before."""
    RESET_REQUIRED = "reset_required"
    NO_PERMISSION = "no_permission"
    HUNG = "hung"
    """A call about it did not return by its deadline."""
    ERROR = "error"

    @property
    def is_lost(self) -> bool:
        """Whether only a reset, a power cycle or the driver can bring the GPU back."""
        return self in (DeviceStatus.LOST, DeviceStatus.HUNG)


@dataclass(frozen=True)
class DeviceReading:
    """One GPU: its identity, its health and its answers."""

    index: int
    """NVML's index of the GPU."""
    uuid: str
    """Empty if the GPU never reported it."""
    status: DeviceStatus
    message: str = ""
    """Why `status` is not OK; with OK, why NVML does not report everything (MIG, vGPU)."""
    values: Mapping[str, Raw] = field(default_factory=dict)
    """Answers by call key (calls.Call.key). Only what the GPU supports; empty unless `status` is OK."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """NVML's error codes of the calls that failed, by call key."""


@dataclass(frozen=True)
class XidCount:
    """How often a GPU reported one Xid since the first reading."""

    index: int
    uuid: str
    xid: int
    count: int
    last_timestamp: float
    """Unix time in seconds at which the event was received."""


@dataclass(frozen=True)
class Reading:
    """One reading of everything; `devices` hold data only if `succeeded`."""

    status: DriverStatus
    message: str = ""
    """Why `status` is not OK."""
    timestamp: float = 0.0
    """Unix time in seconds at which the reading began."""
    duration: float = 0.0
    """Seconds that it took."""
    devices: tuple[DeviceReading, ...] = ()
    """After a failure: only GPUs known to be lost."""
    counted: int = 0
    """GPUs that NVML counts; `devices` also has those that it counted before."""
    library: Mapping[str, Raw] = field(default_factory=dict)
    """Answers without a GPU (versions), by call key."""
    xids: tuple[XidCount, ...] = ()
    last_success_timestamp: float | None = None
    """Unix time of the last reading that succeeded; None before the first."""
    reader_starts: int = 0
    """Processes started to call NVML so far."""
    readers_abandoned: int = 0
    """Processes that could not be killed and still exist."""

    @property
    def succeeded(self) -> bool:
        """Whether NVML answered; single GPUs may still be lost."""
        return self.status in (DriverStatus.OK, DriverStatus.NO_DEVICES)
