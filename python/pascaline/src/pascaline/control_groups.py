"""Limits of this process's control groups: the CPUs it may use, its memory, and the folders that hold these limits."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = 2**62
"""More than any limit; version 1 reports "no limit" as a number slightly below 2**63."""


def usable_cpus(cgroup: Path = CGROUP, root: Path = CGROUP_ROOT) -> int:
    """Return how many threads can compute at once: the CPUs of the affinity mask, or fewer if a quota allows fewer.

    A quota is rounded down, to at least 1: threads wait for each other after every matrix product, so all stand still
    when the quota is used up.
    """
    cpus = len(os.sched_getaffinity(0))
    return max(1, min([cpus, *(math.floor(quota) for quota in _cpu_quotas(cgroup, root))]))


def group_folders(controller: str, cgroup: Path = CGROUP, root: Path = CGROUP_ROOT) -> list[Path]:
    """Return the folders of the groups that this process is in, innermost first; empty if they cannot be read.

    The last is the root of the hierarchy: in a container that is the container's own group.
    controller: `cpu` or `memory`. Version 1 has a hierarchy for each, version 2 (the line `0::`) one for all.
    """
    try:
        lines = [line.split(":", 2) for line in cgroup.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / path.strip("/")
        found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return found


def oom_kills(cgroup: Path = CGROUP, root: Path = CGROUP_ROOT) -> int | None:
    """Return how many processes of this process's own group the kernel has killed for lack of memory; None if unknown.

    Linux, admin-guide/cgroup-v2.rst (memory.events) and cgroup-v1/memory.rst (memory.oom_control): both count kills at
    the group's limit and kills for lack of memory in the whole host.
    """
    for folder in group_folders("memory", cgroup, root)[:1]:
        words = _words(folder / "memory.events") or _words(folder / "memory.oom_control")
        counts = dict(zip(words[::2], words[1::2], strict=False))
        if counts.get("oom_kill", "").isdigit():
            return int(counts["oom_kill"])
    return None


def memory_limit(cgroup: Path = CGROUP, root: Path = CGROUP_ROOT) -> int | None:
    """Return the lowest memory limit of this process's groups in bytes; None without a limit."""
    limits = []
    for folder in group_folders("memory", cgroup, root):
        words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        # Version 2 writes "max" for no limit, version 1 the largest number of pages.
        if words and words[0].isdigit() and int(words[0]) < UNLIMITED_BYTES:
            limits.append(int(words[0]))
    return min(limits, default=None)


def _cpu_quotas(cgroup: Path, root: Path) -> list[float]:
    """Return the number of CPUs that each group with a limit allows."""
    quotas = []
    for folder in group_folders("cpu", cgroup, root):
        words = _words(folder / "cpu.max")  # version 2
        words = words or [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        # "max" and -1 are no limit.
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
