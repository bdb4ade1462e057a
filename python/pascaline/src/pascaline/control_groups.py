"""Limits of this process's control groups: how many CPUs it may use, and the folders that hold its limits."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


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
