"""Reads the kernel's log: Xid events, and processes that were killed because memory ran out."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

CRITICAL_XIDS = frozenset({48, 62, 64, 74, 79, 95, 119, 120})
"""Broken hardware or driver state: the numbers of the alert GpuXidCritical."""
HARMLESS_XIDS = frozenset({45})
"""The driver cleans up after another event, or after a killed program."""

_XID = re.compile(r"NVRM: Xid \([^)]*\): (\d+)")
_KILLED = re.compile(r"[Oo]ut of memory: Killed process (\d+) \(([^)]*)\)|oom-kill:.*task=([^,]+),pid=(\d+)")


def xids(lines: Iterable[str]) -> Counter[int]:
    """Count the Xid events by number, except the harmless ones."""
    numbers = (int(match[1]) for line in lines if (match := _XID.search(line)))
    return Counter(number for number in numbers if number not in HARMLESS_XIDS)


def killed_for_memory(lines: Iterable[str]) -> dict[int, str]:
    """Return the processes that the kernel killed because memory ran out: number -> name."""
    found = {}
    for line in lines:
        if match := _KILLED.search(line):
            found[int(match[1] or match[4])] = match[2] or match[3]
    return found
