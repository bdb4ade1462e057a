"""Runs `python -m pascaline` in forks of a process that has imported it: the import takes half a second of a core.

    process = start(["serve", "--model", "a.gguf"], environment=..., folder=..., stderr=descriptor)

A fork has its own environment, folder, standard streams and signal handlers, and ends as any Python does. It differs from
`python -m pascaline` in what is done before the first line of the package runs: the modules are there, and /proc shows
the command line and the first environment of the process that was forked. A test of these starts a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PRELOADED: Final = (
    "pascaline.cli.bench",
    "pascaline.cli.serve",
    "pascaline.serving.console",
    "pascaline.serving.notify",
    "pascaline.serving.supervisor",
    "pascaline.serving.threads",
    "pydantic.v1",  # FastAPI imports it when it makes its first route
)
"""What `pascaline serve` imports until it is ready, and `pascaline bench`."""
BEFORE_PYTHON: Final = ("PYTHON", "LC_", "LANG", "MALLOC_", "LD_", "GLIBC_")
"""Beginnings of variables that act on a process before or while Python starts, so that a fork would not obey them."""
INHERITED_SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""Signals that a parent can ignore for its children, as nohup does."""
_MOST_BYTES: Final = 1 << 20


class Fork:
    """A fork, with those of subprocess.Popen's methods and attributes that tests need."""

    def __init__(self, channel: socket.socket) -> None:
        """Wait for its process id on the channel, on which its exit status comes."""
        self._channel = channel
        self.pid = self._next()
        self.returncode: int | None = None

    def _next(self) -> int:
        message = self._channel.recv(_MOST_BYTES)
        assert message, "the process that imported pascaline has ended"
        return int(message)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            ready = select.poll()  # and not select.select, as tests open thousands of descriptors
            ready.register(self._channel, select.POLLIN)
            if not ready.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(["pascaline"], timeout or 0)
            self.returncode = self._next()
            self._channel.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a fork obeys all that this environment changes of that of the tests."""
    names = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    return not any(name.startswith(BEFORE_PYTHON) for name in names)


def start(
    arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path, stderr: int, stdout: int | None = None
) -> Fork:
    """Run `pascaline` with these arguments; standard input is /dev/null. Raises AssertionError if it cannot.

    stderr, stdout: open files, which stay open here; None is /dev/null.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ignored = [int(number) for number in INHERITED_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    job = {
        "arguments": list(arguments),
        "environment": dict(environment),
        "folder": str(folder),
        "ignored": ignored,
    }
    with theirs, Path(os.devnull).open("wb") as null:
        out = null.fileno() if stdout is None else stdout
        socket.send_fds(_server(), [json.dumps(job).encode()], [out, stderr, theirs.fileno()])
    return Fork(ours)


@functools.cache
def _server() -> socket.socket:
    """Start the process that is forked. It ends with this one, at the latest as the other end of its socket closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    atexit.register(process.wait)
    atexit.register(ours.close)  # first
    return ours


# --- in the process that is forked ------------------------------------------------------------------------------------


def serve_forks(control: socket.socket) -> dict[str, Any]:
    """Fork for each job, and send the process id and the exit status over its channel. Only a fork returns: its job."""
    channels: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            woken.recv(_MOST_BYTES)
            _report(channels)
        if control not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, _MOST_BYTES, 3)
        if not message:  # the tests have ended, perhaps without an end of what they started
            for child in channels:
                os.kill(child, signal.SIGKILL)
            os._exit(0)
        *streams, channel = descriptors
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            for number, stream in enumerate(streams, start=1):
                os.dup2(stream, number)
            for each in (control, woken, wake, *channels.values()):
                each.close()
            for descriptor in descriptors:
                os.close(descriptor)
            job: dict[str, Any] = json.loads(message)
            return job
        for stream in streams:
            os.close(stream)
        channels[child] = socket.socket(fileno=channel)
        channels[child].send(str(child).encode())


def _report(channels: dict[int, socket.socket]) -> None:
    """Tell how the children ended that have ended."""
    while channels:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        with channels.pop(child) as channel, contextlib.suppress(OSError):
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(job: dict[str, Any]) -> None:
    """Be the process that the job describes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in job["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.argv = ["pascaline", *job["arguments"]]
    sys.path[0] = job["folder"]  # as `python -m` has it


def main() -> int:
    """Import, and be whatever is asked for, each in a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end the forks
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = os.path.sep
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    become(serve_forks(control))
    from pascaline.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
