"""Imports the package before pytest imports its tests, which would take the folder pascaline/ for it.

Also takes SIGINT back where the tests run in the background: a shell ignores it there, for every program below. And
lets OpenMP's threads sleep instead of spin, in this process and in those that tests start: tests share the cores.
"""

import os
import signal

import pascaline

__all__ = ["pascaline"]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
signal.signal(signal.SIGINT, signal.default_int_handler)
