"""Ends a worker whose server is gone.

SGLang's workers ask the kernel for this only after a dozen seconds of imports. A server that is killed in that time
leaves a detokenizer of a gigabyte behind, which waits for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""


def die_with_parent() -> None:
    """Ask for SIGKILL at the death of the process that spawned this one; does nothing in the server itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:
        # It died before the kernel was asked.
        os._exit(1)
