"""A process's identity from /proc: its name and its systemd unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_UNIT = re.compile(r"[^/]+\.(?:service|scope)(?=/|$)")


@dataclass(frozen=True)
class ProcessIdentity:
    """What /proc reports about a process; empty if it has ended or this user may not see it."""

    name: str = ""
    unit: str = ""
    """The innermost systemd service or scope, as `pascaline-qwen.service`."""


def identify(pid: int, proc: Path = Path("/proc")) -> ProcessIdentity:
    """Look a process up now."""
    folder = proc / str(pid)
    try:
        name = (folder / "comm").read_text(errors="replace").rstrip("\n")
        return ProcessIdentity(name, unit_of((folder / "cgroup").read_text(errors="replace")))
    except OSError:
        return ProcessIdentity()


def unit_of(cgroup: str) -> str:
    """Return the innermost unit that the text of /proc/PID/cgroup names; "" if none does."""
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # Version 2 has hierarchy 0; in version 1 systemd keeps a hierarchy of its own.
        if hierarchy == "0" or controllers == "name=systemd":
            units = _UNIT.findall(path)
            if units:
                return str(units[-1])
    return ""
