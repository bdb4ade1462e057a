"""What the kernel's log says about single GPUs: Xid events and cards that left the bus, with their address and time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from pascaline.gpu.devices import bus_address
from pascaline.programs import run_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pascaline.programs import Output

PROGRAM_SECONDS = 5.0
"""Longest wait for journalctl and for dmesg."""
OFF_THE_BUS = 79
"""The Xid of a GPU that fell off the bus (NVIDIA, Xid Errors)."""
RESET_XIDS = frozenset({62, 95, 109, 119, 120, 140, 143})
"""Xids after which NVIDIA's Xid catalog requires a reset of the GPU or a restart of the host: a controller on the card
stopped (62, 109, 119, 120, 143) or its memory had an error that was not contained (95, 140)."""

_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_GONE = re.compile(r"NVRM: .*fallen off the bus", re.IGNORECASE)
_GPU = re.compile(r"NVRM: (?:The NVIDIA )?GPU (?:at )?(?:PCI:)?([0-9a-f]*:?[0-9a-f]{2}:[0-9a-f]{2}\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class XidEvent:
    """One event of the driver about one GPU."""

    address: str
    """On the PCI bus, as 0000:3b:00; empty if the line has none."""
    number: int
    line: str
    """The kernel's own words."""


def xid_events(lines: Iterable[str]) -> list[XidEvent]:
    """Return the Xid events among lines of the kernel's log; a card that fell off the bus without one counts as 79.

    The driver names that card in the same line, or in one of those before it.
    """
    found, named = [], ""
    for line in lines:
        if match := _XID.search(line):
            found.append(XidEvent(bus_address(match[1]), int(match[2]), line[match.start() :].strip()))
            continue
        if match := _GPU.search(line):
            named = bus_address(match[1])
        if match := _GONE.search(line):
            found.append(XidEvent(named, OFF_THE_BUS, line[match.start() :].strip()))
    return found


def _run(command: Sequence[str]) -> Output | None:
    return run_program(command, timeout=PROGRAM_SECONDS)


def driver_lines(since: float, run: Callable[[Sequence[str]], Output | None] = _run) -> list[str] | None:
    """Return what the driver wrote to the kernel's log after that Unix time; None if this user may not read it.

    `run` runs a program: the journal is asked first, then the kernel's own buffer.
    """
    journal = ("journalctl", "-k", "-b", "--no-pager", "-o", "short-iso", "-g", "NVRM", f"--since=@{int(since)}")
    for command in (journal, ("dmesg", "--time-format=iso")):
        output = run(command)
        if output is not None and _could_read(output):
            return [line for line in output.text.splitlines() if "NVRM" in line and _time(line) >= int(since)]
    return None


def _could_read(output: Output) -> bool:
    """Whether a program saw the log. journalctl ends with 1 if nothing matched, and reports missing permission."""
    hidden = "not seeing messages" in output.errors or "No journal files" in output.errors
    return not hidden and (output.code == 0 or (output.code == 1 and not output.errors.strip()))


def _time(line: str) -> float:
    """Return the Unix time at the start of a line; infinite if it has none, so that no line is left out."""
    try:
        return datetime.fromisoformat(line.partition(" ")[0]).timestamp()
    except ValueError:
        return float("inf")
