"""Which GPUs a CUDA process sees: the identity of each, and how CUDA_VISIBLE_DEVICES filters the host's list."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import ConfigurationError
from pascaline.gpu.metrics import NAME, PCI_INFO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.gpu.reading import DeviceReading

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
DEVICE_ORDER = "CUDA_DEVICE_ORDER"
BUS_ORDER = "PCI_BUS_ID"
"""The value of CUDA_DEVICE_ORDER with which CUDA counts as NVML does. CUDA's default is FASTEST_FIRST (CUDA C++
Programming Guide, environment variables)."""
PROC_GPUS = Path("/proc/driver/nvidia/gpus")
"""One folder per GPU, named by its bus address and written by NVIDIA's driver; `information` has model and UUID."""

_ADDRESS = re.compile(r"(?:([0-9a-f]+):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})(?:\.[0-7])?", re.IGNORECASE)
_INDEX = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """One GPU of the host. A UUID stays with the card; an index belongs to the card that has it now."""

    index: int
    """In the order of the PCI bus, as NVML and, under CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA count."""
    uuid: str

    """Empty if it is unknown."""
    address: str
    """On the PCI bus, as 0000:3b:00; empty if it is unknown."""
    name: str = ""

    def __str__(self) -> str:
        known = ", ".join(filter(None, (self.uuid, self.address)))
        return f"GPU {self.index} ({known})" if known else f"GPU {self.index}"


def bus_address(text: str) -> str:
    """Return a PCI address as domain:bus:device in lower case, from NVML's, the kernel's or the driver's form.

    "" if the text holds none. A missing domain is 0.
    """
    match = _ADDRESS.search(text)
    if match is None:
        return ""
    domain, bus, device = (int(part or "0", 16) for part in match.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}"


def identity_of(device: DeviceReading) -> GpuIdentity:
    """Return the identity of a GPU that NVML reports."""
    info = device.values.get(PCI_INFO.key)
    address = bus_address(str(info[0])) if isinstance(info, list) and info else ""
    return GpuIdentity(device.index, device.uuid, address, str(device.values.get(NAME.key, "")))


def driver_gpus(folder: Path = PROC_GPUS) -> tuple[GpuIdentity, ...]:
    """Return the GPUs that the driver's folder lists, in the order of the bus. This works without NVML."""
    found = sorted((bus_address(path.parent.name), path) for path in folder.glob("*/information"))
    return tuple(_of_information(index, address, path) for index, (address, path) in enumerate(found))


def _of_information(index: int, address: str, path: Path) -> GpuIdentity:
    text = path.read_text(encoding="utf-8", errors="replace")
    uuid = re.search(r"^GPU UUID:\s*(GPU-[0-9a-f-]+)\s*$", text, re.MULTILINE)
    model = re.search(r"^Model:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)
    return GpuIdentity(index, uuid[1] if uuid else "", address, model[1].removeprefix("NVIDIA ") if model else "")


def visible_gpus(gpus: Sequence[GpuIdentity], visible: str | None) -> list[GpuIdentity]:
    """Return the GPUs that a process sees with this CUDA_VISIBLE_DEVICES (None: not set), in its own order.

    CUDA takes indices and beginnings of UUIDs, and stops at the first entry that names nothing. Raises
    ConfigurationError if it would see none, for a MIG device, a GPU named twice, or a beginning that fits several.
    """
    if visible is None:
        return list(gpus)
    seen: list[GpuIdentity] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = _named(gpus, entry, visible)
        if found is None:
            break
        if found in seen:
            raise ConfigurationError(f"{VISIBLE_DEVICES}={visible} names {found} twice, must name each GPU once")
        seen.append(found)
    if not seen:
        raise ConfigurationError(
            f"{VISIBLE_DEVICES}={visible} names none of the GPUs here, must be an index below {len(gpus)} or a UUID"
        )
    return seen


def _named(gpus: Sequence[GpuIdentity], entry: str, visible: str) -> GpuIdentity | None:
    if entry.upper().startswith("MIG"):
        raise ConfigurationError(
            f"{VISIBLE_DEVICES}={visible} names a MIG device, must be indices or UUIDs of whole GPUs: no Pascal card "
            "has MIG"
        )
    if _INDEX.fullmatch(entry):
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    if not entry.lower().startswith("gpu-"):
        return None
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    if len(found) > 1:
        raise ConfigurationError(
            f"{VISIBLE_DEVICES}={visible} fits {' and '.join(map(str, found))}, must be the beginning of one UUID"
        )
    return found[0] if found else None


def device_variables(device: str, gpus: Sequence[GpuIdentity] = ()) -> dict[str, str]:
    """Return the variables that show an engine only these GPUs, counted as NVML counts; on the CPU none at all.

    If some UUIDs are unknown, CUDA_VISIBLE_DEVICES stays as it is.
    """
    if device == "cpu":
        return {VISIBLE_DEVICES: ""}
    named = {VISIBLE_DEVICES: ",".join(gpu.uuid for gpu in gpus)} if gpus and all(gpu.uuid for gpu in gpus) else {}
    return {DEVICE_ORDER: BUS_ORDER} | named
