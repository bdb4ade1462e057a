"""How SGLang's workers begin, and how one ends whose server has died.

SGLang's workers ask the kernel for this only after a dozen seconds of imports. If the server is killed in that time, a
detokenizer of a gigabyte stays behind and waits for ever.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_pascal.collector import keep_what_is_there
from sglang_pascal.device import devices, is_cuda_initialized
from sglang_pascal.names import WORKERS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""
PARENT_VARIABLE = "SGLANG_PASCAL_PARENT_PID"
"""Gives a spawned process its parent's number, which multiprocessing passes on only after the imports."""
NUMA_BY_COMMAND = "SGLANG_NUMA_BIND_V2"
"""Whether SGLang binds a worker to a NUMA node by the command that spawns it; else the worker does so itself."""
ALLOWED = "allowed"
"""Torch's answer; any other, or none, keeps a server from forking."""
SPAWNED = "--multiprocessing-fork"
"""Argument of every process that multiprocessing spawns."""


def die_with_parent() -> None:
    """In a spawned worker, ask for SIGKILL at the parent's death; in every process, pass its own number to children."""
    if SPAWNED in sys.orig_argv:
        _end_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def fork_workers(*_: object) -> None:
    """Hook after SGLang's `_set_envs_and_config`: start workers as copies of this process, which has their imports.

    A fork has none of its parent's threads and cannot use CUDA that its parent initialised. If CUDA is initialised, the
    workers are spawned, as SGLang does by itself. The variable SGLANG_PASCAL_WORKERS=spawn asks for that too.
    """
    if os.environ.get(WORKERS_VARIABLE) == "spawn":
        return
    # Without a card no worker uses CUDA, and asking torch whether there is one is enough for it to refuse forks.
    if devices() and (is_cuda_initialized() or in_a_fork(_torchs_answer) != ALLOWED):
        logger.warning(
            "workers import everything anew, which takes some dozen seconds longer: "
            "something has initialised CUDA in the server's process, so it cannot fork them"
        )
        return
    keep_what_is_there()
    os.environ[NUMA_BY_COMMAND] = "0"
    multiprocessing.set_start_method("fork", force=True)
    os.register_at_fork(after_in_child=_end_copy_with_parent)


def in_a_fork(ask: Callable[[], str]) -> str:
    """Return what a copy of this process answers: whatever the question does to CUDA or torch, it does not do here."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, ask().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


def _torchs_answer() -> str:
    """Return ALLOWED if torch lets a fork of now use CUDA; it refuses if something asked its CUDA part before."""
    torch = sys.modules.get("torch")
    return ALLOWED if torch is None or not torch.cuda._is_in_bad_fork() else "refused"


def _end_copy_with_parent() -> None:
    _end_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())


def _end_with_parent() -> None:
    """Ask the kernel for SIGKILL at the parent's death; end at once if it died before."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent) and not _is_running(parent):
        os._exit(1)


def _is_running(pid: str) -> bool:
    """Whether a process exists and has not ended: a process that adopts orphans may leave them zombies for long."""
    try:
        state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
