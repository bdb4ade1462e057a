"""Imports the package before pytest imports its tests, which would take the folder pascaline/ for it.

Also takes SIGINT back where the tests run in the background: a shell ignores it there, for every program below.
"""

import signal

import pascaline

__all__ = ["pascaline"]

signal.signal(signal.SIGINT, signal.default_int_handler)
