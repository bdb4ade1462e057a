"""The machine around the GPU: memory, limits, ports, clock, disks."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.doctor.host import Instance, Mount, System
from pascaline.models.cache import cache_folder
from pascaline.planning.placement import CPU_INFO, cpu_flags

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.doctor.machine import Machine


def collect_system(machine: Machine, instance: Instance) -> System:
    """Read kernel, memory, limits, ports, clock and caches."""
    memory_limit, cpu_limit, whose = _cgroup_limits(machine, instance)
    folder = _cuda_cache(instance.environment)
    return System(
        is_nixos="ID=nixos" in (machine.read("/etc/os-release") or ""),
        glibc=_glibc(machine),
        memory=_memory(machine.read("/proc/meminfo") or ""),
        cpu_flags=cpu_flags(machine.read(CPU_INFO) or ""),
        huge_pages=_chosen(machine.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""),
        governor=(machine.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "").strip(),
        memory_limit=memory_limit,
        cpu_limit=cpu_limit,
        limits_of=whose,
        open_files=_open_files(machine, instance),
        listening=_listening(machine),
        clock_synchronised=_clock_synchronised(machine),
        unix_time=machine.now,
        cache=_mount(machine, cache_folder(instance.settings)) if instance.settings else None,
        cuda_cache=_mount(machine, Path(folder)) if folder else None,
        cuda_cache_folder=folder,
        cuda_cache_writable=bool(folder) and _is_writable(machine.path(folder)),
    )


def _memory(text: str) -> dict[str, int]:
    return {match[1]: int(match[2]) * 1024 for match in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _chosen(text: str) -> str:
    """Return the value in brackets: `always [madvise] never`."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def _glibc(machine: Machine) -> str:
    output = machine.run("getconf", ["getconf", "GNU_LIBC_VERSION"])
    return output.text.strip().removeprefix("glibc ") if output and output.code == 0 else ""


def _cgroup_limits(machine: Machine, instance: Instance) -> tuple[int | None, float | None, str]:
    """Return the tightest memory and CPU limits of the instance's process or, without one, of this process."""
    pid = unit_pid(instance)
    whose, source = (f"the unit of {instance.name}", pid) if pid else ("this process", "self")
    folders = cgroup_folders(machine, source)
    memory = [
        int(text) for folder in folders if (text := (machine.read(f"{folder}/memory.max") or "").strip()).isdigit()
    ]
    cpus = [limit for folder in folders if (limit := _cpus(machine.read(f"{folder}/cpu.max") or "")) is not None]
    return min(memory, default=None), min(cpus, default=None), whose


def unit_pid(instance: Instance) -> str:
    """Return the number of the unit's main process; empty if it does not run."""
    pid = instance.unit.get("MainPID", "0")
    return "" if pid == "0" else pid


def cgroup_folders(machine: Machine, process: str) -> list[str]:
    """Return the folders of a process's cgroup and of those above it, outermost first; empty if unknown."""
    match = re.search(r"^0::(/.*)$", machine.read(f"/proc/{process}/cgroup") or "", re.MULTILINE)
    parts = [part for part in match[1].split("/") if part] if match else []
    return ["/sys/fs/cgroup/" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _cpus(text: str) -> float | None:
    """Return the CPUs that a cpu.max file allows: `QUOTA PERIOD` or `max PERIOD`."""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _open_files(machine: Machine, instance: Instance) -> int | None:
    pid = instance.unit.get("MainPID", "0")
    if pid in ("", "0"):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return None if limit == resource.RLIM_INFINITY or machine.root != Path("/") else limit
    match = re.search(r"^Max open files\s+\S+\s+(\d+)", machine.read(f"/proc/{pid}/limits") or "", re.MULTILINE)
    return int(match[1]) if match else None


def _listening(machine: Machine) -> frozenset[int]:
    """Return the ports in state LISTEN (0A) of /proc/net/tcp and tcp6."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (machine.read(table) or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(ports)


def _clock_synchronised(machine: Machine) -> bool | None:
    output = machine.run("timedatectl", ["timedatectl", "show", "--property=NTPSynchronized"])
    match = re.search(r"^NTPSynchronized=(yes|no)$", output.text if output else "", re.MULTILINE)
    return match[1] == "yes" if match else None


def _cuda_cache(environment: Mapping[str, str]) -> str:
    """Return the folder of the driver's compiled kernels: CUDA_CACHE_PATH, or its default under the home folder."""
    home = environment.get("HOME", "")
    return environment.get("CUDA_CACHE_PATH") or (f"{home}/.nv/ComputeCache" if home else "")


def _mount(machine: Machine, folder: Path) -> Mount | None:
    """Return the file system of a folder, or of its nearest existing parent."""
    rows = [line.split() for line in (machine.read("/proc/self/mounts") or "").splitlines()]
    mounts = [(row[1].replace("\\040", " "), row[2]) for row in rows if len(row) > 2]
    holding = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    if not holding:
        return None
    # If two mounts share one point, the later one hides the earlier.
    point, kind = max(enumerate(holding), key=lambda item: (len(item[1][0]), item[0]))[1]
    return Mount(point, kind, _free_bytes(machine.path(folder)))


def _free_bytes(folder: Path) -> int | None:
    for existing in (folder, *folder.parents):
        try:
            status = os.statvfs(existing)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return None


def _is_writable(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return os.access(existing, os.W_OK | os.X_OK)
