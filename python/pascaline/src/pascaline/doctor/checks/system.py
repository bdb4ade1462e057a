"""Checks of the machine around the GPU: memory, disks, limits, ports, clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pascaline.doctor.kernel_log import killed_for_memory
from pascaline.doctor.verdicts import Checks, Remedy, Result, failure, info, ok, skipped, warning
from pascaline.engines import ENGINES
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("System")
check = CHECKS.check

ENGINE_BYTES = 4 * 2**30
"""Resident memory of SGLang's processes without weights: 0.95 + 1.7 + 0.9 GB measured, plus a margin."""
LEAST_OPEN_FILES = 4096
LEAST_CACHE_BYTES = 2**30
"""Room for prepared models (32 MiB each), compiled kernels and traces."""
OLDEST_CLOCK = 1_735_689_600.0
"""2025-01-01. An earlier clock was never set, and every TLS certificate then fails."""


@check(
    "host-memory",
    "The host has enough memory for the engine",
    "free memory, add swap for the time of loading, or use a smaller model on the CPU",
    command="ps -eo rss,args --sort=-rss | head",
)
def _host_memory(host: Host) -> Result:
    """Compares MemAvailable with what SGLang's processes need; on a CPU, plus the weights."""
    available = host.system.memory.get("MemAvailable")
    if available is None:
        return skipped("/proc/meminfo does not report it")
    if host.instance.is_running:
        return ok(f"{format_bytes(available)} are available beside the running engine")
    needed = ENGINE_BYTES
    if host.model.spec and not host.wants_gpu:
        needed += host.model.spec.file_bytes
    words = f"{format_bytes(available)} available, about {format_bytes(needed)} needed"
    return ok(words) if available >= needed else warning(words)


@check(
    "cgroup-memory",
    "No cgroup limit is below what the engine needs",
    "raise the limit, or remove it",
    command="systemctl set-property pascaline-<name>.service MemoryMax=infinity",
    option='services.pascaline.instances.<name>.memoryMax = "24G";',
)
def _cgroup_memory(host: Host) -> Result:
    """Reads memory.max of the unit and every cgroup above it. A process that reaches it is killed without a message."""
    limit = host.system.memory_limit
    if limit is None:
        return ok(f"no limit on {host.system.limits_of}")
    needed = ENGINE_BYTES + (host.model.spec.file_bytes if host.model.spec and not host.wants_gpu else 0)
    words = f"{format_bytes(limit)} for {host.system.limits_of}, about {format_bytes(needed)} needed"
    return ok(words) if limit >= needed else failure(words)


@check(
    "cgroup-cpu",
    "No CPU quota slows the engine",
    "raise the quota: the CPU launches the kernels, and the GPU idles while a launch waits",
    command="systemctl set-property pascaline-<name>.service CPUQuota=",
)
def _cgroup_cpu(host: Host) -> Result:
    """Reads cpu.max of the unit and everything above it. SGLang runs three processes, one of which is always busy."""
    limit = host.system.cpu_limit
    if limit is None:
        return ok(f"no quota on {host.system.limits_of}")
    words = f"{limit:g} CPUs for {host.system.limits_of}"
    return warning(words) if limit < 2 else ok(words)


@check(
    "open-files",
    "The limit of open files is high enough",
    "raise the limit: every request holds a socket",
    command="ulimit -Hn; systemctl edit pascaline-<name>.service  # LimitNOFILE=65536",
)
def _open_files(host: Host) -> Result:
    """Reads the hard limit of open files of the unit's process or, without a unit, of this one."""
    limit = host.system.open_files
    if limit is None:
        return skipped("the limit is unknown")
    return ok(str(limit)) if limit >= LEAST_OPEN_FILES else warning(f"{limit}, should be {LEAST_OPEN_FILES} or more")


@check(
    "huge-pages",
    "Transparent huge pages are available",
    "allow them for programs that ask: large buffers then cause fewer page faults",
    command="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    option='boot.kernelParams = [ "transparent_hugepage=madvise" ];',
)
def _huge_pages(host: Host) -> Result:
    """Reads the kernel's setting. It matters if the model runs on the CPU, and while a file is copied to the GPU."""
    found = host.system.huge_pages
    if not found:
        return skipped("this kernel has no transparent huge pages")
    return info(found) if found == "never" else ok(found)


@check(
    "cpu-governor",
    "The CPU may run at its full clock",
    "choose the governor performance: with small batches decoding waits for kernel launches, which one CPU makes",
    command="cpupower frequency-set -g performance",
    option='powerManagement.cpuFreqGovernor = "performance";',
)
def _cpu_governor(host: Host) -> Result:
    """Reads the frequency governor of the first CPU."""
    found = host.system.governor
    if not found:
        return skipped("the kernel does not set CPU clocks here (a virtual machine?)")
    return info(found) if found == "powersave" else ok(found)


@check(
    "disk-space",
    "The cache has room",
    "make room, or put the cache on another disk",
    command="pascaline models gc --dry-run; df -h",
    option='services.pascaline.stateDir = "/data/pascaline";',
)
def _disk_space(host: Host) -> Result:
    """Reads the free bytes of the disk that holds prepared models and compiled kernels."""
    mount = host.system.cache
    if mount is None or mount.free_bytes is None:
        return skipped("the cache folder's file system is unknown")
    words = f"{format_bytes(mount.free_bytes)} free on {mount.point}"
    return ok(words) if mount.free_bytes >= LEAST_CACHE_BYTES else failure(words)


@check(
    "clock",
    "The clock is right",
    "let a time service set it: certificates, journals and metrics all depend on it",
    command="timedatectl set-ntp true",
    option="services.timesyncd.enable = true;",
)
def _clock(host: Host) -> Result:
    """Asks whether a time service has set the clock, and whether the date is plausible."""
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(host.system.unix_time))
    if host.system.unix_time < OLDEST_CLOCK:
        return failure(f"the clock says {shown}, which is wrong")
    synchronised = host.system.clock_synchronised
    if synchronised is None:
        return skipped(f"{shown}; no time service reports whether the clock is synchronised")
    return ok(f"{shown}, synchronised") if synchronised else warning(f"{shown}, not synchronised")


@check(
    "ports",
    "The ports are free, or in use by the instance itself",
    "stop what listens there, or give the instance other ports",
    command="ss -ltnp",
    option="services.pascaline.instances.<name>.settings.port = 30010;",
)
def _ports(host: Host) -> Result:
    """Looks in /proc/net/tcp for listeners on the engine's and the agent's port."""
    settings = host.settings
    if settings is None:
        return skipped("the settings could not be read; see configuration")
    wanted = {"port": settings.port, "agent_port": settings.agent_port}
    if host.instance.health is not None:
        return ok(f"{settings.port} and {settings.agent_port} are this instance's")
    taken = {key: port for key, port in wanted.items() if port in host.system.listening}
    if taken:
        ports = " ".join(f"sport = :{port}" for port in taken.values()).replace(" sport", " or sport")
        remedy = Remedy(
            "stop what listens there, or give the instance another port",
            f"ss -ltnp '( {ports} )'",
            f"services.pascaline.instances.<name>.settings.{next(iter(taken))} = 30010;",
        )
        return failure(", ".join(f"{key} {port} is taken" for key, port in taken.items()), remedy)
    return ok(f"{settings.port} and {settings.agent_port} are free")


@check(
    "oom-history",
    "The kernel killed no process because memory ran out",
    "run less on the host, or raise the instance's memory limit; add swap for the time of loading",
    command="journalctl -k -g 'Out of memory|oom-kill' -n 20",
    option='services.pascaline.instances.<name>.memoryMax = "24G";',
)
def _oom_history(host: Host) -> Result:
    """Searches this boot's kernel log for processes that were killed because host or cgroup memory ran out."""
    if host.logs.kernel is None:
        return skipped("this user may not read the kernel's log; add it to the group systemd-journal")
    killed = killed_for_memory(host.logs.kernel)
    if not killed:
        return ok("nothing since the boot")
    words = ", ".join(f"{name} ({pid})" for pid, name in killed.items())
    ours = ("pascaline", *(name for engine in ENGINES.values() for name in engine.processes))
    engine = any(name.startswith(ours) for name in killed.values())
    return failure(words) if engine else warning(words)
