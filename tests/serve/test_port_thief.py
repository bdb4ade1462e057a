"""Another program on the engine's port: it is sent nothing, is not taken for the engine, and is named."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import ExitCode
from support.instance import wait_until
from support.ports import this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.instance import Instance

    Serve = Callable[..., Instance]

KEY = "sk-test-0123456789abcdef"
MODELS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@contextlib.contextmanager
def thief(port: int, seconds: float = 30.0) -> Iterator[list[bytes]]:
    """Listen on a port as soon as it is free, and answer as an engine might; yields all that was heard."""
    heard: list[bytes] = []
    listener = wait_until("the port is free", lambda: _listener(port), seconds=seconds, every=0.01)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(2)
                    heard.append(connection.recv(4096))
                    connection.sendall(MODELS)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _listener(port: int) -> socket.socket | None:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


def test_between_a_crash_and_the_restart(serve: Serve, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    instance = serve(api_key_file=key, max_restarts=20)
    instance.wait_for_state("ready")
    instance.fault(crash_now=1)
    with thief(instance.settings["port"]) as heard:
        line = instance.wait_for_line(f"is in use by {this_process()}")
        assert "port: port " in line
        assert instance.agent("/readyz").status == 503
        wait_until("it is named as the reason", lambda: this_process() in instance.health()["reason"])
        time.sleep(2)
    assert [each for each in heard if each] == []
    instance.wait_for_state("ready")
    assert instance.stop() == ExitCode.OK


def test_while_the_engine_loads(serve: Serve, tmp_path: Path) -> None:
    """It is faster than the engine, which then cannot listen."""
    key = tmp_path / "key"
    key.write_text(KEY)
    instance = serve(api_key_file=key, faults="start_seconds=3")
    instance.wait_for_line("Load weight begin")
    with thief(instance.settings["port"]) as heard:
        assert instance.wait() == ExitCode.ENGINE_FAILED
    assert [each for each in heard if each] == []
    port, pid = instance.settings["port"], instance.text.partition("engine (pid ")[2].partition(")")[0]
    assert instance.error == (
        f"the engine ended with exit code 1: its port is in use; port {port} is listened on by {this_process()}, which is no "
        f"process of the engine (pid {pid}); stop that process, or set port to a free port"
    )
