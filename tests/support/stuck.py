"""Makes a process that not even SIGKILL ends, as one whose call into a driver does not return, and lets it end again."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# PTRACE_SEIZE with PTRACE_O_TRACEEXIT (<linux/ptrace.h>): the kernel stops the process on its way out until we let go.
_TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
print(libc.ptrace(0x4206, int(sys.argv[1]), None, 0x40), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def unkillable(pid: int) -> Iterator[None]:
    """While the block runs, the process cannot end."""
    command = [sys.executable, "-I", "-S", "-c", _TRACER, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != "0\n":
            pytest.skip("this machine does not let a test trace another process")
        yield
