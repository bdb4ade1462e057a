"""Memory of the device on which a model will run: a GPU's from NVML, the host's from /proc and the control group."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.control_groups import CGROUP, CGROUP_ROOT, group_folders
from pascaline.errors import MissingError
from pascaline.gpu.devices import identity_of, visible_gpus
from pascaline.gpu.metrics import (
    BUS_WIDTH,
    COMPUTE_CAPABILITY,
    CORES,
    GPU_MEMORY_CALLS,
    MAX_MEMORY_CLOCK,
    MAX_SM_CLOCK,
    NAME,
)
from pascaline.gpu.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pascaline.gpu.devices import GpuIdentity
    from pascaline.gpu.reading import Reading

PCI_DEVICES = Path("/sys/bus/pci/devices")
NUMA_NODES = Path("/sys/devices/system/node")
CPUS = Path("/sys/devices/system/cpu")
MEMINFO = Path("/proc/meminfo")
TRANSFERS_PER_CYCLE = 2
"""Double data rate of the clock that NVML reports: 2 x 3003 MHz x 256 bit is the 192 GB/s of a P4's data sheet."""
MEGA = 10**6
GIGA = 10**9
BITS_PER_BYTE = 8
CODING_BEFORE, CODING_SINCE_PCIE_3, PCIE_3_TRANSFERS = 8 / 10, 128 / 130, 8e9
"""Bits of data in those that a lane transfers, and the transfers per second from which the second one holds (PCI
Express Base Specification 3.0)."""
MOST_LANES = 32
LINK_SHARE = 0.76
"""Share of the link's data rate with which pinned memory is copied: 12 GB/s of 15.75 over PCIe 3.0 x16, estimated."""


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What bounds a GPU's speed, as NVML reports it."""

    bandwidth_bytes_per_second: float
    """Peak of the memory."""
    cores: int
    clock_hertz: float
    """Highest clock of the multiprocessors."""
    compute_capability: str
    """As in "6.1"."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device, bytes."""

    name: str
    """The driver's name for it; `cpu` for the host."""
    total_bytes: int
    """For a GPU all memory that the driver reports, for the host the available memory."""
    used_bytes: int = 0
    """Memory that other processes and the driver use."""
    gpus: tuple[GpuIdentity, ...] = ()
    """The GPUs that a process would see, this one first; empty for the host."""
    rates: GpuRates | None = None
    """What NVML says of a GPU's speed; None for the host, and if NVML does not say it."""


def gpu_memory(visible: str | None = None, environment: Mapping[str, str] | None = None) -> DeviceMemory:
    """Return the memory of the first GPU that a process would see.

    visible: value of CUDA_VISIBLE_DEVICES, None = all. environment: of the process that asks NVML (None = this one's).
    Raises ConfigurationError if `visible` names none of the GPUs, MissingError if NVML shows none or fails.
    """
    with Reader(environment=environment) as reader:
        reading = reader.read()
    return memory_of_visible(reading, visible)


def memory_of_visible(reading: Reading, visible: str | None = None) -> DeviceMemory:
    """Return the memory of the first GPU that a process would see, from a reading; errors as in gpu_memory."""
    devices = {device.index: device for device in reading.devices if device.values}
    if not devices:
        reason = reading.message or "NVML counts no GPU"
        raise MissingError(f"NVML shows no GPU: {reason}; name a card (--card) to plan without it")
    gpus = tuple(visible_gpus([identity_of(device) for device in devices.values()], visible))
    device = devices[gpus[0].index]
    name = str(device.values.get(NAME.key, "GPU")).removeprefix("NVIDIA ")
    for call, total_at, free_at in GPU_MEMORY_CALLS:
        values = device.values.get(call.key)
        if isinstance(values, list):
            total, free = values[total_at], values[free_at]
            if isinstance(total, int) and isinstance(free, int):
                return DeviceMemory(name, total, total - free, gpus, rates_of(device.values))
    raise MissingError(f"NVML does not report the memory of {name}; name a card (--card) to plan without it")


def rates_of(values: Mapping[str, Any]) -> GpuRates | None:
    """Return what NVML's answers about a GPU say of its speed; None if one is missing, or 0, which is no answer."""
    cores, clock = values.get(CORES.key), values.get(MAX_SM_CLOCK.key)
    capability, bandwidth = values.get(COMPUTE_CAPABILITY.key), _bandwidth(values)
    if not (isinstance(cores, int) and isinstance(clock, int) and isinstance(capability, list)):
        return None
    if not (cores and clock and bandwidth and len(capability) == len(("major", "minor"))):
        return None
    return GpuRates(bandwidth, cores, clock * MEGA, f"{capability[0]}.{capability[1]}")


def _bandwidth(values: Mapping[str, Any]) -> float | None:
    """Return the peak of the memory: transfers x clock x width, bytes/s."""
    clock, width = values.get(MAX_MEMORY_CLOCK.key), values.get(BUS_WIDTH.key)
    if isinstance(clock, int) and isinstance(width, int):
        return TRANSFERS_PER_CYCLE * clock * MEGA * width / BITS_PER_BYTE or None
    return None


def memory_bandwidth(name: str, environment: Mapping[str, str] | None = None) -> float | None:
    """Return the peak bandwidth of the memory of this host's GPU of that name, bytes/s.

    None if there is no such GPU, or NVML is absent or does not report it. environment: as in gpu_memory.
    """
    with Reader(environment=environment) as reader:
        devices = reader.read().devices
    named = (device.values for device in devices if device.values.get(NAME.key) == name)
    return next((rate for values in named if (rate := _bandwidth(values)) is not None), None)


def host_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, cgroup_root: Path = CGROUP_ROOT) -> DeviceMemory:
    """Return the bytes that this process may still use: MemAvailable, or less under a control group's MemoryMax."""
    lines = meminfo.read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return DeviceMemory("cpu", min([available, *_cgroup_rooms(cgroup, cgroup_root)]))


def _cgroup_rooms(cgroup: Path, root: Path) -> list[int]:
    """Bytes that each control group around this process leaves; version 2 only.

    A group is charged for the page cache of files that it has read, which the kernel drops before it refuses memory.
    Beyond memory.high the kernel slows its processes down to a crawl.
    """
    rooms = []
    for folder in group_folders("memory", cgroup, root):
        with contextlib.suppress(OSError, ValueError):
            used = int((folder / "memory.current").read_text()) - _page_cache(folder)
            limits = (_limit(folder / name) for name in ("memory.max", "memory.high"))
            rooms += [max(0, limit - used) for limit in limits if limit is not None]
    return rooms


def _limit(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def _page_cache(folder: Path) -> int:
    """Bytes of files that a control group is charged for, without shared memory."""
    try:
        text = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    return sum(int(size) for size in re.findall(r"^(?:in)?active_file (\d+)$", text, re.MULTILINE))


def numa_node(address: str, devices: Path = PCI_DEVICES) -> int | None:
    """Return the NUMA node of a GPU by its address (0000:3b:00); None if the kernel names none (it writes -1)."""
    try:
        node = int((devices / f"{address}.0" / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def link_rate(address: str, devices: Path = PCI_DEVICES) -> float | None:
    """Return the bytes per second with which pinned memory reaches a GPU (0000:3b:00); None if its link is unknown.

    The lanes are those in use; the speed is the highest that both ends have, since an idle link is slowed down.
    """
    device = devices / f"{address}.0"
    try:
        lanes = int((device / "current_link_width").read_text())
        ends = [device / "max_link_speed", device.resolve().parent / "max_link_speed"]
        # 8.0 GT/s PCIe
        rates = [float(end.read_text().split()[0]) * GIGA for end in ends if end.is_file()]
    except (OSError, ValueError, IndexError):
        return None
    if not rates or not 0 < lanes <= MOST_LANES or min(rates) <= 0:
        return None
    coding = CODING_SINCE_PCIE_3 if min(rates) >= PCIE_3_TRANSFERS else CODING_BEFORE
    return lanes * min(rates) * coding / BITS_PER_BYTE * LINK_SHARE


def node_cpus(node: int, nodes: Path = NUMA_NODES) -> frozenset[int]:
    """Return the CPUs of a NUMA node; empty if the kernel does not list them."""
    try:
        return parse_cpus((nodes / f"node{node}/cpulist").read_text())
    except OSError:
        return frozenset()


def socket_nodes(node: int, nodes: Path = NUMA_NODES, cpus: Path = CPUS) -> tuple[int, ...]:
    """Return the NUMA nodes of the sockets that this node's CPUs belong to, in order.

    The node alone, unless the firmware divides a socket into several (sub-NUMA clusters, NPS), or if the kernel does
    not report the sockets.
    """
    wanted = _sockets(node, nodes, cpus)
    numbers = sorted(int(path.name.removeprefix("node")) for path in nodes.glob("node[0-9]*"))
    return tuple(number for number in numbers if _sockets(number, nodes, cpus) & wanted) or (node,)


def _sockets(node: int, nodes: Path, cpus: Path) -> frozenset[int]:
    found = set()
    for cpu in node_cpus(node, nodes):
        with contextlib.suppress(OSError, ValueError):
            found.add(int((cpus / f"cpu{cpu}/topology/physical_package_id").read_text()))
    return frozenset(number for number in found if number >= 0)


def physical_cores(cpus: Iterable[int], folder: Path = CPUS) -> frozenset[int]:
    """Return one CPU of each core among `cpus`; a CPU whose core the kernel does not report counts as one."""
    wanted = frozenset(cpus)
    first = set()
    for cpu in sorted(wanted):
        try:
            siblings = parse_cpus((folder / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings = frozenset()
        first.add(min((siblings & wanted) | {cpu}))
    return frozenset(first)


def node_bytes(node: int, nodes: Path = NUMA_NODES) -> int | None:
    """Return the memory of a NUMA node; None if the kernel does not report it (Node 0 MemTotal: 98304 kB)."""
    try:
        match = re.search(r"MemTotal:\s+(\d+) kB", (nodes / f"node{node}/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list as the kernel writes it (0-15,32-47); empty if the text is not such a list."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    try:
        return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))
    except ValueError:
        return frozenset()
