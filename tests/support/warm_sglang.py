"""Runs scripts in a Python that has imported the real SGLang already: an import costs ten seconds of a core.

`WarmSGLang` starts one process, which imports once and runs each script in a fork of itself. So a script gets what a fresh
interpreter has after the import, whatever the scripts before it changed. A test of the import itself needs a process of
its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PLATFORM: Final = """
from sglang.srt.platforms import current_platform
current_platform.device_name
import sglang.srt.model_executor.model_runner
"""
"""The import of a module of SGLang's, with the plugin as its platform."""
WORKER: Final = """
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.benchmark.one_batch
import sglang.srt.model_executor.model_runner
from sglang.srt.models import registry
registry.ModelRegistry.get_supported_archs()
"""
"""What a worker of the engine has imported when it loads a model; the plugin's shims are in place."""
ENVIRONMENT: Final = {
    "CUDA_VISIBLE_DEVICES": "",
    "SGLANG_PLATFORM": "pascal",
    "HF_HUB_OFFLINE": "1",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",  # the core in Rust fails with torch from 2.11 on
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else torch starts processes, which a fork would share
}
IMPORT_SECONDS: Final = 300.0
STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02


class WarmSGLang:
    """A process that has imported SGLang."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Talk to a process that runs `serve_forks`."""
        self._process = process

    def run(self, script: str, *arguments: str, timeout: float = 300.0) -> Any:
        """Run a script in a fork; return the JSON that its last line prints. Raises as `output` does."""
        return json.loads(self.output(script, *arguments, timeout=timeout).splitlines()[-1])

    def output(self, script: str, *arguments: str, timeout: float = 300.0) -> str:
        """Run a script in a fork; return what it prints.

        Raises AssertionError with the end of its error output if it fails, and if it takes longer than `timeout` seconds.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder, "output"), Path(folder, "errors")
            job = {"script": script, "arguments": arguments, "output": str(output), "errors": str(errors)}
            self._process.stdin.write(json.dumps(job | {"seconds": timeout}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, f"the process that imported SGLang ended with {self._process.wait(STOP_SECONDS)}"
            assert int(answer) == 0, (
                f"exit status {int(answer)}\n{output.read_text()[-2000:]}{errors.read_text()[-3000:]}"
            )
            return output.read_text()


@contextlib.contextmanager
def warm_sglang(prelude: str = PLATFORM) -> Iterator[WarmSGLang]:
    """Start the process; it imports while the caller goes on, and ends with the context."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "TORCHDYNAMO_"))}
    command = [sys.executable, __file__, prelude]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean | ENVIRONMENT
    ) as process:
        try:
            yield WarmSGLang(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(IMPORT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def serve_forks(prelude: str, jobs: IO[str], answers: IO[str]) -> None:
    """Import, then answer each job, a line of JSON, by its exit status."""
    exec(prelude, {"__name__": "prelude"})
    gc.freeze()  # SGLang collects garbage often, which would look at all that is imported, and copy it in each fork
    for line in jobs:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(job)
        answers.write(f"{_wait(child, job['seconds'])}\n")
        answers.flush()


def _wait(child: int, seconds: float) -> int:
    """Return the exit status of a process. Kill it if it has not ended in time (seconds)."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(_POLL_SECONDS)


def _run(job: dict[str, Any]) -> None:
    """Be the script, and never return."""
    status = 1
    try:
        for number, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["-c", *job["arguments"]]
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        exec(compile(job["script"], "<script>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    # SGLang and its dependencies print while they are imported.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve_forks(sys.argv[1], sys.stdin, answers)
    os._exit(0)  # to take SGLang down takes seconds
