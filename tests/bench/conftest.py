"""`pascaline bench` as a process, and servers of the fake engine for it to measure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support import warm_pascaline
from support.instance import FAKE_ENGINE, MARK, PATIENCE, free_port, http, wait_until
from support.models import tiny, write_gguf
from support.warm_pascaline import Fork, can_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STREAMS = ("stdout", "stderr")


@dataclass
class Bench:
    """One run of `pascaline bench`."""

    process: subprocess.Popen[bytes] | Fork
    mark: str
    folder: Path
    """Of the files with its standard output and error."""
    output: str = ""
    errors: str = ""

    def finish(self, seconds: float = 3 * PATIENCE) -> int:
        """Wait for its end and return the exit code; nothing that it started may be left."""
        code = self.process.wait(timeout=seconds)
        self.output, self.errors = ((self.folder / name).read_text() for name in STREAMS)
        assert "Traceback" not in self.errors, self.errors
        assert self.left() == []
        return code

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """End it as Ctrl-C does."""
        self.process.send_signal(number)
        return self.finish()

    def left(self) -> list[str]:
        """Return its other running processes."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.pid != self.process.pid and process.environ().get(MARK) == self.mark:
                    found.append(" ".join(process.cmdline()))
        return found


@pytest.fixture
def bench(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Bench]]:
    """Start `pascaline bench ARGUMENTS`: a process of its own, if it has an environment of its own, else a fork."""
    runs: list[Bench] = []

    def start(*arguments: object, **environment: str) -> Bench:
        mark = uuid.uuid4().hex
        folder = tmp_path_factory.mktemp("streams")
        given = ["bench", *map(str, arguments)]
        variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment, MARK: mark}
        with (folder / STREAMS[0]).open("wb") as stdout, (folder / STREAMS[1]).open("wb") as stderr:
            if not environment and can_fork(variables):
                files = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
                process = warm_pascaline.start(given, environment=variables, folder=tmp_path, **files)
            else:
                process = subprocess.Popen(
                    [sys.executable, "-m", "pascaline", *given],
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=variables,
                    cwd=tmp_path,
                )
        runs.append(Bench(process, mark, folder))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a server of the fake engine and return its URL."""
    with contextlib.ExitStack() as stack:

        def start(faults: str = "", *arguments: str) -> str:
            port = free_port()
            command = [sys.executable, str(FAKE_ENGINE), "-m", "sglang.launch_server", "--model-path", "tiny"]
            process = subprocess.Popen(
                [*command, "--port", str(port), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "FAKE_ENGINE_FAULTS": faults},
                cwd=tmp_path,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            url = f"http://127.0.0.1:{port}"
            wait_until("an answer", lambda: answers(url))
            return url

        yield start


def answers(url: str) -> bool:
    """Whether a server answers at all."""
    with contextlib.suppress(OSError):
        return http(f"{url}/ready").status == 200
    return False


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file of some hundred KiB."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny("llama"), "Q8_0")


@pytest.fixture
def instance_flags(model: Path, tmp_path: Path) -> list[Any]:
    """Flags with which bench starts an instance on the fake engine."""
    flags = ["--model", model, "--engine-executable", FAKE_ENGINE, "--device", "cpu", "--cache-dir", tmp_path / "cache"]
    return [*flags, "--probe-interval", "0.5"]
