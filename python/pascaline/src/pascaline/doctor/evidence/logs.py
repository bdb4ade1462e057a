"""Lines of the journal about the driver, about lack of memory, and from the instance."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pascaline.doctor.evidence.instance import UNIT_PREFIX
from pascaline.doctor.host import Logs

if TYPE_CHECKING:
    from pascaline.doctor.machine import Machine

_KERNEL_LINES = (
    "NVRM|Xid|[Oo]ut of memory|oom-kill|AER:|nouveau|nvidia.*(probe|power state|version|symbol|Key)|[Ll]ockdown:"
    "|Loading of (unsigned )?module|BAR [0-9]+"
)


def collect_logs(machine: Machine, name: str) -> Logs:
    """Read the kernel's lines since the boot about driver and lack of memory, and the instance's last lines."""
    kernel = machine.run(
        "journalctl-kernel",
        ["journalctl", "-k", "-b", "--no-pager", "-o", "short-iso", "-n", "2000", "-g", _KERNEL_LINES],
    )
    if kernel is None or "not seeing messages" in kernel.errors or "No journal files" in kernel.errors:
        kernel = machine.run("dmesg", ["dmesg", "--time-format=iso"])
    unit = None
    if name and "/" not in name:
        unit = machine.run(
            "journalctl-unit", ["journalctl", "-u", f"{UNIT_PREFIX}{name}", "--no-pager", "-o", "cat", "-n", "1000"]
        )
    return Logs(_lines(kernel, _KERNEL_LINES), _lines(unit, ""))


def _lines(output: Any, pattern: str) -> tuple[str, ...] | None:
    if output is None or (output.code not in (0, 1) or (output.code == 1 and output.errors.strip())):
        return None
    return tuple(line for line in output.text.splitlines() if re.search(pattern, line) and not line.startswith("-- "))
