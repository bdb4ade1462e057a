"""Ends a worker whose server has died.

SGLang's workers ask the kernel for this only after a dozen seconds of imports. If the server is killed in that time, a
detokenizer of a gigabyte stays behind and waits for ever.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""
PARENT_VARIABLE = "SGLANG_PASCAL_PARENT_PID"
"""Gives a spawned process its parent's number, which multiprocessing passes on only after the imports."""
SPAWNED = "--multiprocessing-fork"
"""Argument of every process that multiprocessing spawns."""


def die_with_parent() -> None:
    """In a spawned worker, ask for SIGKILL at the parent's death; in every process, pass its own number to children."""
    parent = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if parent is None or SPAWNED not in sys.orig_argv:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent) and not _is_running(parent):
        # The parent died before the kernel was asked.
        os._exit(1)


def _is_running(pid: str) -> bool:
    """Whether a process exists and has not ended: a process that adopts orphans may leave them zombies for long."""
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
