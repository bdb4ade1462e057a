"""Ends a worker whose server is gone.

SGLang's workers ask the kernel for this only after a dozen seconds of imports. A server that is killed in that time
leaves a detokenizer of a gigabyte behind, which waits for ever.
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
"""How a spawned process knows its parent's number: multiprocessing tells it only after the imports."""
SPAWNED = "--multiprocessing-fork"
"""Argument of every process that multiprocessing spawns."""


def die_with_parent() -> None:
    """In a spawned worker ask for SIGKILL at the death of its parent; in every process be known to its children."""
    parent = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if parent is None or SPAWNED not in sys.orig_argv:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent) and not _is_running(parent):
        # It died before the kernel was asked.
        os._exit(1)


def _is_running(pid: str) -> bool:
    """Whether a process is there and has not ended: whoever adopts orphans may leave it a zombie for long."""
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
