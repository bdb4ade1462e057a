"""Finds an engine's processes wherever they went, and ends them.

A process that makes a session of its own leaves the engine's group, and one whose parent ends leaves its tree. What it
keeps is its first environment (proc_pid_environ(5)), in which every run of an engine has a mark of its own. Only a
process that overwrites that memory too is out of reach here; under systemd the unit's control group ends it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VARIABLE = "PASCALINE_ENGINE_OF"
"""The mark is PID:START:NAMESPACE:RUN: pascaline's process id, its start (ticks after boot), the namespace of its
process ids, and the number of the run."""
PROC = Path("/proc")
_START_FIELD = 19
"""Of proc_pid_stat(5), counted from the state on."""
_MOST_DIGITS = 10
"""Of a process id (PID_MAX_LIMIT of <linux/threads.h> has seven)."""
_POLL_SECONDS = 0.02
_runs = itertools.count()


class Stray(NamedTuple):
    """A process of an engine."""

    pid: int
    name: str
    mark: str


def new_mark() -> str:
    """Return the mark of a run that begins now."""
    return f"{_supervisor(os.getpid())}:{next(_runs)}"


def end(mark: str, seconds: float) -> list[Stray]:
    """Kill every process with this mark; return those that are still there after `seconds`."""
    return _end(lambda each: each.mark == mark, seconds)[1]


def end_orphans(seconds: float) -> list[Stray]:
    """Kill the engines' processes whose pascaline is gone, such as after its SIGKILL; return them."""
    return _end(lambda each: _is_orphan(each.mark), seconds)[0]


def _end(wanted: Callable[[Stray], bool], seconds: float) -> tuple[list[Stray], list[Stray]]:
    """Return all that were found, and those that are left."""
    found: dict[int, Stray] = {}
    deadline = time.monotonic() + seconds
    # More than once, since a process can start another while the list is read.
    while left := [each for each in _strays() if wanted(each)]:
        if found and time.monotonic() > deadline:
            break
        for each in left:
            found[each.pid] = each
            _kill(each)
        time.sleep(_POLL_SECONDS)
    return list(found.values()), left


def _kill(stray: Stray) -> None:
    """Kill a process, and no other that has its number meanwhile."""
    with contextlib.suppress(OSError):
        process = os.pidfd_open(stray.pid)
        try:
            if _mark(stray.pid) == stray.mark:
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _strays() -> Iterator[Stray]:
    for folder in PROC.glob("[0-9]*"):
        pid = int(folder.name)
        if (mark := _mark(pid)) is not None:
            with contextlib.suppress(OSError):
                yield Stray(pid, (folder / "comm").read_text(errors="replace").strip(), mark)


def _mark(pid: int) -> str | None:
    """Return a process's mark; None if it has none, belongs to another user, or has ended."""
    try:
        variables = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    start = f"{VARIABLE}=".encode()
    return next((each[len(start) :].decode(errors="replace") for each in variables if each.startswith(start)), None)


def _is_orphan(mark: str) -> bool:
    """Whether the pascaline that a mark names has ended; False if that cannot be told, such as from a container."""
    pid, start, namespace, *_ = [*mark.split(":"), "", ""]
    if not pid.isdecimal() or len(pid) > _MOST_DIGITS or not start or not namespace or namespace != _namespace():
        return False
    try:
        return _start(int(pid)) != start
    except (FileNotFoundError, ProcessLookupError):
        return True
    except (OSError, LookupError):
        return False


def _supervisor(pid: int) -> str:
    """Return what a mark says of a process; without a start if it cannot be read, so that it is nobody's orphan."""
    try:
        start = _start(pid)
    except (OSError, LookupError):
        start = ""
    return f"{pid}:{start}:{_namespace()}"


def _start(pid: int) -> str:
    return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[_START_FIELD]


def _namespace() -> str:
    try:
        return str((PROC / "self/ns/pid").readlink()).strip("pid:[]")
    except OSError:
        return ""
