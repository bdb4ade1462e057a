"""Becomes a program that dies with its parent: child.py PARENT_PID CPUS PROGRAM ARGUMENTS…

CPUS is a list (0,1,2) to which the program is bound, or `all`.

`with_parent` returns the command. It runs this file with `-I -S`, so that it starts in milliseconds and ignores
Python's environment variables. It is a separate program, because a process with threads cannot safely run Python code
between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""<linux/prctl.h>"""
NOT_FOUND = 127
ALL = "all"


def with_parent(*command: str, cpus: frozenset[int] = frozenset()) -> tuple[str, ...]:
    """Return a command that runs `command` until the thread that starts it, or this whole process, ends.

    cpus: those that it and its children may use; empty: those of this process.
    """
    bound = ",".join(map(str, sorted(cpus))) or ALL
    return sys.executable, "-I", "-S", __file__, str(os.getpid()), bound, *command


def main() -> None:
    """Ask the kernel for SIGKILL at the parent's death, then become the program."""
    parent, cpus, *command = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        # The parent died before prctl took effect.
        os._exit(NOT_FOUND)
    if cpus != ALL:
        _bind(cpus)
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"failed to run {command[0]}: {error.strerror}\n")
        os._exit(NOT_FOUND)


def _bind(cpus: str) -> None:
    """Bind this process; a CPU that went offline meanwhile must not keep the program from starting."""
    try:
        os.sched_setaffinity(0, map(int, cpus.split(",")))
    except OSError as error:
        sys.stderr.write(f"failed to bind to the CPUs {cpus}: {error.strerror}; it runs on all\n")


if __name__ == "__main__":
    main()
