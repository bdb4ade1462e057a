"""How fast the host reads its memory, for each NUMA node: measured on request, and kept for later plans.

One thread on each CPU of a node reads memory of that node from end to end. What the node's caches could hold is too
little: the threads' blocks together are several times as large.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import platform
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.errors import MissingError
from pascaline.gpu.memory import CPUS, NUMA_NODES, node_cpus
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FILE = "host-memory.json"
"""Name in the cache folder."""
SECONDS = 1.5
"""How long a node's threads read, once their memory is written."""
LEAST_BLOCK_BYTES = 64 * 2**20
"""Least memory that one thread reads."""
CACHE_MULTIPLE = 4
"""The blocks of a node together are this many times its last-level caches."""
READ_BYTES = 16 * 2**20
"""Memory that is read between two looks at the clock."""
FREE_SHARE = 0.5
"""Most of the free memory that is taken."""
IDLE_SHARE = 0.9
"""Share of the time that the threads must get on their CPUs; below, other work has disturbed the measurement."""
CPU_INFO = Path("/proc/cpuinfo")
_ABSENT, _PRESENT = 0, 1


@dataclass(frozen=True, slots=True)
class NodeBandwidth:
    """What one NUMA node reads from its own memory."""

    node: int
    bytes_per_second: float
    threads: int
    """One on each of these CPUs."""
    block_bytes: int
    """Memory that they read, all together, again and again."""
    cache_bytes: int
    """Last-level caches of the node; 0 if the kernel does not report them."""
    cpu_share: float
    """Share of the time in which the threads had their CPUs: 1 on an idle host."""

    @property
    def is_disturbed(self) -> bool:
        """Whether other work had the CPUs for so long that the figure is of no use."""
        return self.cpu_share < IDLE_SHARE

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the figure may be wrong, one phrase each."""
        notes = []
        if self.is_disturbed:
            notes.append(f"other work took {1 - self.cpu_share:.0%} of the CPUs, so the memory is faster")
        if self.is_cached:
            notes.append("too little memory was free to outgrow the caches, so the memory is slower")
        return tuple(notes)

    @property
    def is_cached(self) -> bool:
        """Whether caches may have held much of what was read, so that the memory itself is slower."""
        return self.block_bytes < 2 * self.cache_bytes


@dataclass(frozen=True, slots=True)
class HostBandwidth:
    """A measurement of this host."""

    measured_at: str
    """Date and time in UTC, ISO 8601."""
    cpu: str
    """Model name of the CPU."""
    nodes: tuple[NodeBandwidth, ...]

    def of_nodes(self, nodes: Iterable[int]) -> tuple[NodeBandwidth, ...]:
        """Return the measurements of these nodes, which together read the sum; of the slowest one if one is missing."""
        wanted = frozenset(nodes)
        found = tuple(node for node in self.nodes if node.node in wanted)
        return found if found and len(found) == len(wanted) else (min(self.nodes, key=_rate),)

    def to_json(self) -> dict[str, Any]:
        """As plain values, which `load` reads."""
        return {"measured_at": self.measured_at, "cpu": self.cpu, "nodes": [asdict(node) for node in self.nodes]}


def _rate(node: NodeBandwidth) -> float:
    return node.bytes_per_second


def usable_nodes(cpus: Iterable[int], nodes: Path = NUMA_NODES) -> dict[int, frozenset[int]]:
    """Return the NUMA nodes and those of their CPUs that are among `cpus`, without nodes that have none.

    A host whose kernel lists no nodes is one node, 0.
    """
    usable = frozenset(cpus)
    numbers = sorted(int(path.name.removeprefix("node")) for path in nodes.glob("node[0-9]*"))
    found = {number: node_cpus(number, nodes) & usable for number in numbers}
    found = {number: own for number, own in found.items() if own}
    return found or {0: usable}


def cache_bytes(cpus: Iterable[int], folder: Path = CPUS) -> int:
    """Return the bytes of the last-level caches of these CPUs, each counted once; 0 if the kernel lists none."""
    sizes: dict[str, int] = {}
    for cpu in cpus:
        levels = {level: index for index in (folder / f"cpu{cpu}/cache").glob("index*") if (level := _level(index))}
        if levels:
            last = levels[max(levels)]
            sizes[_text(last / "shared_cpu_list") or str(cpu)] = _size(_text(last / "size"))
    return sum(sizes.values())


def _level(index: Path) -> int:
    text = _text(index / "level")
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _size(text: str) -> int:
    """Return the bytes of a size as the kernel writes it: 32768K."""
    match = re.fullmatch(r"(\d+)K", text)
    return int(match[1]) * 1024 if match else 0


def cpu_model(cpu_info: Path = CPU_INFO) -> str:
    """Return the CPU's model name as the kernel reports it, or the machine's architecture if it reports none."""
    return model_name(_text(cpu_info))


def model_name(cpu_info: str) -> str:
    """Return the model name of the first CPU in the text of /proc/cpuinfo, else this machine's architecture."""
    match = re.search(r"^model name\s*:\s*(.+?)\s*$", cpu_info, re.MULTILINE)
    return match[1] if match else platform.machine()


def measure(nodes: Mapping[int, frozenset[int]], free_bytes: int, *, seconds: float = SECONDS) -> HostBandwidth:
    """Measure these nodes one after the other. free_bytes: memory of the host that may be used.

    Raises MissingError if too little memory is free.
    """
    found = tuple(_measure_node(node, sorted(cpus), free_bytes, seconds) for node, cpus in sorted(nodes.items()))
    return HostBandwidth(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), cpu_model(), found)


def block_bytes(threads: int, caches: int, free_bytes: int) -> int:
    """Return the bytes of one thread's block, whole pages. Raises MissingError if even the least does not fit."""
    most = int(free_bytes * FREE_SHARE) // threads
    if most < LEAST_BLOCK_BYTES:
        needed = format_bytes(threads * LEAST_BLOCK_BYTES / FREE_SHARE)
        raise MissingError(
            f"--measure-host: {threads} threads need {needed} of free memory, {format_bytes(free_bytes)} are free; "
            "stop what uses it, and measure again"
        )
    wanted = max(LEAST_BLOCK_BYTES, math.ceil(CACHE_MULTIPLE * caches / threads))
    return min(wanted, most) // mmap.PAGESIZE * mmap.PAGESIZE


def _measure_node(node: int, cpus: Sequence[int], free_bytes: int, seconds: float) -> NodeBandwidth:
    caches = cache_bytes(cpus)
    size = block_bytes(len(cpus), caches, free_bytes)
    together = threading.Barrier(len(cpus))
    with ThreadPoolExecutor(len(cpus)) as pool:
        found = list(pool.map(lambda cpu: _read(cpu, size, seconds, together), cpus))
    rates, shares = zip(*found, strict=True)
    return NodeBandwidth(node, sum(rates), len(cpus), size * len(cpus), caches, sum(shares) / len(cpus))


def _read(cpu: int, size: int, seconds: float, together: threading.Barrier) -> tuple[float, float]:
    """Return the bytes per second that a thread on this CPU reads while the others of its node do the same, and the
    share of the time in which it had the CPU.

    The kernel takes memory from the node of the thread that writes it first. memchr for a byte that is not there reads
    all of it, with the widest loads that the CPU has; ctypes releases the interpreter's lock meanwhile.
    """
    # 0 is this thread.
    os.sched_setaffinity(0, {cpu})
    library = ctypes.CDLL(None)
    library.memchr.restype = ctypes.c_void_p
    library.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    try:
        with mmap.mmap(-1, size) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            block = ctypes.c_char.from_buffer(memory)
            address = ctypes.addressof(block)
            ctypes.memset(address, _PRESENT, size)
            together.wait()
            began, computed, done = time.perf_counter(), time.thread_time(), 0
            while (passed := time.perf_counter() - began) < seconds:
                offset = done % size
                count = min(READ_BYTES, size - offset)
                library.memchr(address + offset, _ABSENT, count)
                done += count
            share = min(1.0, (time.thread_time() - computed) / passed)
            del block
    except BaseException:
        # The others would wait for this thread without end.
        together.abort()
        raise
    return done / passed, share


def save(measured: HostBandwidth, folder: Path) -> Path:
    """Keep a measurement in the cache folder, which exists. Raises OSError if it cannot be written."""
    path = folder / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(measured.to_json(), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def load(folder: Path, cpu: str | None = None) -> HostBandwidth | None:
    """Return the kept measurement; None if the file is missing, unreadable, or from another CPU model.

    cpu: model name of this host's CPU; None means ask the kernel.
    """
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return parse(text, cpu_model() if cpu is None else cpu)


def parse(text: str, cpu: str) -> HostBandwidth | None:
    """Return the measurement in the text of a kept file; None as for `load`."""
    try:
        entry = json.loads(text)
        nodes = tuple(NodeBandwidth(**node) for node in entry["nodes"])
        found = HostBandwidth(str(entry["measured_at"]), str(entry["cpu"]), nodes)
        valid = all(math.isfinite(node.bytes_per_second) and node.bytes_per_second > 0 for node in nodes)
    except (ValueError, KeyError, TypeError):
        return None
    return found if nodes and valid and found.cpu == cpu else None
