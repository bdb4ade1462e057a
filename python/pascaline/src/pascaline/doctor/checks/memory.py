"""Checks of the host's memory: it serves what the GPU's does not hold, and the CPUs that launch kernels."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pascaline.doctor.verdicts import Checks, Result, info, ok, skipped, warning
from pascaline.gpu.devices import identity_of
from pascaline.planning.speed import host_speed
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.doctor.host import Gpu, Host, MemorySlot, NumaNode

CHECKS = Checks("Host memory")
check = CHECKS.check

SLOWER_SHARE = 0.8
"""Measured bandwidth below this share of what the plan assumed is reported."""
LEAST_SWAPPED_BYTES = 64 * 2**20
"""Less of a unit in swap is what its processes used once, while they started."""


@check(
    "numa-distance",
    "The engine runs on the CPUs beside its GPU",
    "let the instance run on the CPUs of the card's node: leave CPUAffinity and threads to it, or name the node",
    command="systemctl show pascaline-<name>.service -p CPUAffinity -p AllowedCPUs; lstopo",
    option="services.pascaline.instances.<name>.numaNode = 0;",
)
def _numa_distance(host: Host) -> Result:
    """Compares the NUMA node of each GPU with those of the CPUs that the instance's processes on it may use, by the
    distances that the firmware reports. Copies and kernel launches from another socket cross the link between the two.
    """
    nodes = {node.number: node for node in host.memory.nodes}
    if len(nodes) < 2:
        return ok("one NUMA node") if nodes else skipped("the kernel lists no NUMA nodes")
    seen = [(gpu, nodes.get(number)) for gpu in host.gpus if (number := _node_of(gpu, host)) is not None]
    if not seen:
        return skipped("the kernel names no NUMA node of a GPU")
    words, far = [], False
    for gpu, node in seen:
        text, is_far = _placed(gpu, node, host.memory.nodes)
        words.append(text)
        far |= is_far
    return warning("; ".join(words)) if far else ok("; ".join(words))


def _node_of(gpu: Gpu, host: Host) -> int | None:
    address = identity_of(gpu.reading).address
    return next((pci.numa_node for pci in host.driver.pci if pci.address.startswith(f"{address}.")), None)


def _placed(gpu: Gpu, node: NumaNode | None, nodes: Sequence[NumaNode]) -> tuple[str, bool]:
    """Return where a GPU and its processes are, and whether they are apart."""
    if node is None:
        return f"{gpu.label} is at a NUMA node that is not online", False
    cpus = frozenset().union(*(process.cpus for process in gpu.processes))
    words = f"{gpu.label} is at NUMA node {node.number}"
    if len(node.socket) > 1:
        words += f" (its socket has nodes {', '.join(map(str, sorted(node.socket)))})"
    if not cpus:
        return f"{words}; the CPUs of the processes that use it are unknown", False
    apart = [other for other in nodes if other.number not in {node.number, *node.socket} and cpus & other.cpus]
    if not apart:
        return f"{words}, as are the CPUs of its processes", False
    others = ", ".join(f"{other.number} (distance {node.distances.get(other.number, '?')})" for other in apart)
    return f"{words}, its processes may run on node {others}; {node.distances.get(node.number, 10)} is its own", True


@check(
    "memory-channels",
    "Every memory channel holds a module",
    "put a module of the same size on each channel: the bandwidth grows with the channels, and experts on the host "
    "are as fast as it",
    command="dmidecode --type 17 | grep -E 'Locator|Size|Speed'",
)
def _memory_channels(host: Host) -> Result:
    """Reads the slots that the firmware describes, by dmidecode, which needs root. On most servers, the names of
    slots contain their channels; if they do not, the modules are only counted.
    """
    slots = host.memory.slots
    if not slots:
        return skipped(host.memory.slots_error)
    words = _modules(slots)
    if not all(slot.channel for slot in slots):
        return ok(f"{words}; the names of the slots do not contain their channels")
    filled = Counter[str]()
    for slot in slots:
        filled[slot.channel] += slot.bytes
    empty = sorted(channel for channel, size in filled.items() if not size)
    if empty:
        return warning(f"{words}; {len(empty)} of {len(filled)} channels are empty ({', '.join(empty)})")
    if len(set(filled.values())) > 1:
        return info(f"{words}; the {len(filled)} channels hold different amounts, so part of them is slower")
    return ok(f"{words}, on {len(filled)} channels alike")


def _modules(slots: Sequence[MemorySlot]) -> str:
    """Return how many modules there are, their bytes, and their speeds if they are known."""
    modules = [slot for slot in slots if slot.bytes]
    speeds = sorted({slot.speed for slot in modules if slot.speed})
    words = f"{len(modules)} modules in {len(slots)} slots, {format_bytes(sum(slot.bytes for slot in modules))}"
    return f"{words} at {' and '.join(speeds)}" if speeds else words


@check(
    "memory-bandwidth",
    "The host's memory is as fast as the plan assumed",
    "look for empty memory channels, a slow memory speed in the firmware, and other work on the host; measure again",
    command="pascaline plan --measure-host",
)
def _memory_bandwidth(host: Host) -> Result:
    """Compares the kept measurement of `pascaline plan --measure-host` with what the plan of the instance assumed. It
    bounds the speed of experts and layers in the host's memory.
    """
    measured = host.memory.bandwidth
    if measured is None:
        return skipped("not measured on this CPU; pascaline plan --measure-host does, on an idle host")
    found = measured.of_nodes(_nodes_beside(host))
    rate, numbers = sum(node.bytes_per_second for node in found), " and ".join(str(node.node) for node in found)
    words = f"{rate / 1e9:,.0f} GB/s on NUMA node {numbers}, measured {measured.measured_at[:10]}"
    assumed = _assumed(host)
    if assumed is None:
        return ok(f"{words}; the plan keeps no weights on the host")
    words += f"; the plan assumed {assumed / 1e9:,.0f}"
    return warning(words) if rate < SLOWER_SHARE * assumed else ok(words)


def _nodes_beside(host: Host) -> frozenset[int]:
    """Return the NUMA nodes of the socket of the first GPU whose node is known; none if no GPU's is."""
    nodes = {node.number: node for node in host.memory.nodes}
    known = (number for gpu in host.gpus if (number := _node_of(gpu, host)) is not None)
    number = next(known, None)
    if number is None:
        return frozenset()
    return (nodes[number].socket if number in nodes else frozenset()) or frozenset({number})


def _assumed(host: Host) -> float | None:
    """Return the bandwidth on which the running instance's plan is based, else that of a plan made now."""
    rates = (host.instance.plan or {}).get("host_rates")
    if isinstance(rates, dict) and isinstance(rates.get("memory_bytes_per_second"), int | float):
        return float(rates["memory_bytes_per_second"])
    found = host_speed(host.plan.request) if host.plan and host.plan.request.device == "cuda" else None
    return found.memory_bytes_per_second if found else None


@check(
    "swap",
    "Nothing of the instance is in swap",
    "free memory, or keep the unit out of swap: a step that needs a page from the disk waits for it",
    command="systemctl set-property pascaline-<name>.service MemorySwapMax=0",
    option='boot.kernel.sysctl."vm.swappiness" = 1;',
)
def _swap(host: Host) -> Result:
    """Reads memory.swap.current of the unit's cgroup, else how much of the host's swap is in use."""
    total, free = (host.system.memory.get(key) for key in ("SwapTotal", "SwapFree"))
    if total == 0:
        return ok("the host has no swap")
    swapped = host.memory.swapped_bytes
    if swapped is not None:
        words = f"{format_bytes(swapped)} of the unit of {host.instance.name}"
        return warning(words) if swapped >= LEAST_SWAPPED_BYTES else ok(words)
    if total is None or free is None:
        return skipped("/proc/meminfo does not report it")
    return ok(f"{format_bytes(total - free)} of {format_bytes(total)} in use, by no unit of an instance")
