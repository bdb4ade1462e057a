"""SIGTERM where Ctrl-C would be: in plain code, in asyncio, and in a job whose shell made it ignore Ctrl-C."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, signal, sys, time
from pascaline.cli.signals import interrupt_on_sigterm

signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2] == "ignored" else signal.default_int_handler)
interrupt_on_sigterm()

async def request():
    await asyncio.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)

async def requests():
    async with asyncio.TaskGroup() as group:
        group.create_task(request())
        group.create_task(asyncio.sleep(60))

def plain():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

try:
    asyncio.run(requests()) if sys.argv[1] == "asyncio" else plain()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(("where", "sigint"), [("asyncio", "default"), ("plain", "default"), ("plain", "ignored")])
def test_sigterm_is_one_interruption_and_nothing_else_is_said(where: str, sigint: str) -> None:
    command = [sys.executable, "-c", SCRIPT, where, sigint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
