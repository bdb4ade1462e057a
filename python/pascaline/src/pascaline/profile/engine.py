"""An engine of our own during a recording: `pascaline serve` as a child, under nvprof if nvprof is the recorder."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.configuration import CONFIG_VARIABLE, variable_of
from pascaline.errors import EngineError
from pascaline.profile.session import POLL_SECONDS, ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

STOP_SECONDS = 180.0
"""nvprof writes its record when the engine ends, which takes time."""

_WRAPPER = """#!/bin/sh
# Runs instead of the engine's Python: SGLang under nvprof, everything else unchanged.
case "$*" in
*sglang.launch_server*)
  exec {nvprof} --profile-child-processes --profile-from-start off --openacc-profiling off --quiet \\
    --export-profile {output}/nvprof-%p.sqlite {python} "$@" ;;
*) exec {python} "$@" ;;
esac
"""


def write_nvprof_wrapper(folder: Path, nvprof: str, python: str) -> Path:
    """Write the program to name as engine_executable, and return its path. nvprof's records go to the same folder."""
    path = folder / "python-under-nvprof"
    path.write_text(
        _WRAPPER.format(nvprof=shlex.quote(nvprof), python=shlex.quote(python), output=shlex.quote(str(folder)))
    )
    path.chmod(0o755)
    return path


def free_ports() -> tuple[int, int]:
    """Return two loopback ports on which nothing listens now."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@contextmanager
def serving(settings: Mapping[str, str], config: Path | None, log: Path, timeout: float) -> Iterator[tuple[str, str]]:
    """Serve with these settings (dotted key -> text) on loopback, and yield (engine's URL, agent's URL) when ready.

    log: file for its output. timeout: seconds until it is ready. If it never is, the EngineError names the log.
    """
    port, agent_port = free_ports()
    chosen = {**settings, "host": "127.0.0.1", "agent_host": "127.0.0.1", "port": str(port)}
    chosen["agent_port"] = str(agent_port)
    environment = {**os.environ, **{variable_of(key): text for key, text in chosen.items()}}
    if config is not None:
        environment[CONFIG_VARIABLE] = str(config)
    agent = f"http://127.0.0.1:{agent_port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            with_parent(sys.executable, "-m", "pascaline", "serve"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, agent, log, timeout)
        yield f"http://127.0.0.1:{port}", agent
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], agent: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while ask(f"{agent}/readyz") is None:
        if process.poll() is not None:
            last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
            raise EngineError(f"the instance ended with exit code {process.returncode}: {last.strip()} (see {log})")
        if time.monotonic() >= deadline:
            raise EngineError(f"the instance was not ready within {timeout:g} s; see {log}")
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, wait until the profiler has written its record, then kill it; its engine dies with it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
