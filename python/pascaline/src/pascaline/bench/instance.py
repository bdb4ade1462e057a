"""The instance to measure: one that already runs, or one that `pascaline serve` starts for the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.bench.sampling import ExporterGpu, LocalGpu
from pascaline.bench.server import ask, describe
from pascaline.bench.stream import Endpoint
from pascaline.child import with_parent
from pascaline.defaults import PORTS
from pascaline.errors import EngineError, ExitCode, MissingError
from pascaline.redaction import read_secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pascaline.bench.sampling import GpuSource
    from pascaline.engines.server import Server

POLL_SECONDS = 0.25
STOP_SECONDS = 60.0
"""From SIGTERM to SIGKILL of the instance. Its drain_timeout is 0, but an engine needs time to end."""
AGENT_OFFSET = PORTS.agent - PORTS.engine
"""Distance from an engine's port to its agent's."""
EXPORTER_PORT = PORTS.exporter


@dataclass(frozen=True, slots=True)
class Instance:
    """A server that answers requests."""

    endpoint: Endpoint
    server: Server
    agent: Endpoint | None
    """The agent of the instance; None for a server that pascaline did not start."""
    start_seconds: float | None = None
    """From start to ready; None if it was already running."""

    def engine_pid(self) -> int | None:
        """Return the engine's process on this machine; None if it is unknown."""
        health = self._agent_says("/health")
        return health.get("engine_pid") if health and self.endpoint.is_local else None

    def plan(self) -> dict[str, Any] | None:
        """Return the plan that the instance was started with."""
        return self._agent_says("/plan")

    def model_path(self) -> str | None:
        """Return the model's file or folder: the agent knows the original, an engine only what was made from it."""
        model = (self._agent_says("/health") or {}).get("model") or {}
        return model.get("path") or self.server.model_path

    @contextlib.contextmanager
    def gpu(self, exporter_url: str | None) -> Iterator[GpuSource | None]:
        """Give a reader of the instance's GPU: this machine's NVML or an exporter's page; None for a CPU instance."""
        if self._runs_on_cpu():
            yield None
            return
        source: GpuSource
        if exporter_url is None and self.endpoint.is_local:
            source = LocalGpu()
        else:
            source = ExporterGpu(exporter_url or f"http://{self.endpoint.address[0]}:{EXPORTER_PORT}/metrics")
        with contextlib.closing(source):
            yield source

    def _runs_on_cpu(self) -> bool:
        """Whether the instance says that it runs on the CPU: a GPU of its host is then not its own."""
        return "cpu" in {(self.plan() or {}).get("device"), (self.server.settings or {}).get("device")}

    def _agent_says(self, path: str) -> dict[str, Any] | None:
        if self.agent is None:
            return None
        with contextlib.suppress(MissingError):
            status, answer = ask(self.agent, path)
            return answer if status == 200 and isinstance(answer, dict) else None
        return None


def attach(endpoint: Endpoint) -> Instance:
    """Return the instance behind a URL."""
    server = describe(endpoint)
    host, port = endpoint.address
    agent = Endpoint(f"http://{f'[{host}]' if ':' in host else host}:{port + AGENT_OFFSET}")
    with contextlib.suppress(MissingError):
        status, health = ask(agent, "/health")
        if status == 200 and isinstance(health, dict) and (health.get("model") or {}).get("name") == server.model:
            return Instance(endpoint, server, agent)
    return Instance(endpoint, server, None)


@contextlib.contextmanager
def started(
    flags: Sequence[str], log: Path, api_key: str | None, on_wait: Callable[[float, str], None]
) -> Iterator[Instance]:
    """Run `pascaline serve` on two free ports until the block ends.

    flags: its settings. log: the file for its output. on_wait: called with (seconds so far, state) until it is ready.
    Raises EngineError with the end of its output if it does not become ready.
    """
    port, agent_port = _free_ports()
    command = [sys.executable, "-m", "pascaline", "serve", *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--agent-host", "127.0.0.1"]
    command += ["--agent-port", str(agent_port), "--drain-timeout", "0"]
    endpoint = Endpoint(f"http://127.0.0.1:{port}", api_key)
    agent = Endpoint(f"http://127.0.0.1:{agent_port}")
    began = time.monotonic()
    with log.open("ab") as output:
        # Its own session: Ctrl-C reaches only this program, which then ends the instance in order.
        process = subprocess.Popen(
            with_parent(*command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_until_ready(process, agent, log, began, on_wait)
            seconds = time.monotonic() - began
            yield Instance(endpoint, describe(endpoint), agent, seconds)
        finally:
            _end(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], agent: Endpoint, log: Path, began: float, on_wait: Callable[[float, str], None]
) -> None:
    while process.poll() is None:
        state = "starting"
        with contextlib.suppress(MissingError):
            status, verdict = ask(agent, "/readyz")
            if status == 200:
                return
            state = (verdict or {}).get("state", state)
        on_wait(time.monotonic() - began, state)
        time.sleep(POLL_SECONDS)
    raise EngineError(
        f"pascaline serve ended with exit code {process.returncode} ({_meaning(process.returncode)}); "
        f"its last line: {_last_line(log)}; the whole log: {log}"
    )


def _meaning(code: int) -> str:
    return next((each.meaning for each in ExitCode if each == code), "killed" if code < 0 else "unknown")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "none"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_ports() -> tuple[int, int]:
    """Return two ports that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return int(first.getsockname()[1]), int(second.getsockname()[1])


def read_api_key(path: Path | None) -> str | None:
    """Return the API key in a file."""
    return read_secret(path) if path else None


def to_flags(values: dict[str, Any]) -> list[str]:
    """Return settings (dotted key -> value) as flags of `pascaline serve`."""
    from pascaline.configuration import flag_of

    flags = []
    for key, value in values.items():
        flag = flag_of(key)
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            flags += [part for name, item in value.items() for part in (flag, f"{name}={item}")]
        elif isinstance(value, (list, tuple)):
            flags += [f"{flag}={item}" for item in value]
        else:
            flags += [flag, json.dumps(value) if isinstance(value, float) else str(value)]
    return flags
