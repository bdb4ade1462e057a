"""What listens on the engine's port: its own processes, nothing, or a program that is named."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.engines.client import request
from pascaline.serving import listener as listener_module
from pascaline.serving.listener import EngineListener, ForeignListenerError, Listener, reached
from support.ports import this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IPV6 = Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text()
NEEDS_IPV6 = pytest.mark.skipif(not IPV6, reason="no IPv6 loopback")
KEY = "sk-test-0123456789"
# Listens in itself, in a child, or in a grandchild that left the session; says where, then waits to be told to end.
PROGRAM = """
import os, socket, sys, time
host, depth, leave = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for _ in range(depth):
    if os.fork():
        os.wait()
        sys.exit()
if leave:
    os.setsid()
family = socket.AF_INET6 if ":" in host else socket.AF_INET
listener = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
print(listener.getsockname()[1], flush=True)
time.sleep(60)
"""


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[int, int]]]:
    """Start a program that leads a session and listens; returns its process id and the port."""
    with contextlib.ExitStack() as ends:

        def started(host: str = "127.0.0.1", depth: int = 0, leave: int = 0) -> tuple[int, int]:
            command = [sys.executable, "-c", PROGRAM, host, str(depth), str(leave)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            assert process.stdout is not None
            ends.callback(process.stdout.close)
            ends.callback(process.wait)
            for pid in [process.pid, *_descendants(process.pid)] if not depth else [process.pid]:
                ends.callback(_end, pid)
            port = int(process.stdout.readline())
            for pid in _descendants(process.pid):
                ends.callback(_end, pid)
            return process.pid, port

        yield started


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "0.0.0.0"),
        pytest.param("::1", "::1", marks=NEEDS_IPV6),
        pytest.param("::", "::", marks=NEEDS_IPV6),
        pytest.param("::", "127.0.0.1", marks=NEEDS_IPV6),
    ],
)
@pytest.mark.parametrize(("depth", "leave"), [(0, 0), (2, 0), (2, 1)])
def test_the_engines_own(start: Callable[..., tuple[int, int]], host: str, told: str, depth: int, leave: int) -> None:
    leader, port = start(host, depth, leave)
    listener = EngineListener(told, port, leader)
    (address, found_port), inode = listener()
    assert found_port == port
    assert address in {"127.0.0.1", "::1"}
    assert listener() == ((address, port), inode)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", pytest.param("::", marks=NEEDS_IPV6)])
def test_another_program_is_named(start: Callable[..., tuple[int, int]], host: str) -> None:
    leader, _ = start()
    other, port = start(host)
    name = Path(f"/proc/{other}/comm").read_text().strip()
    with pytest.raises(ForeignListenerError) as raised:
        EngineListener("127.0.0.1", port, leader)()
    assert str(raised.value) == (
        f"port {port} is listened on by {name} (pid {other}), which is no process of the engine (pid {leader}); "
        "stop that process, or set port to a free port"
    )


def test_nobody(start: Callable[..., tuple[int, int]]) -> None:
    leader, _ = start()
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match=f"^nothing listens on 127.0.0.1 port {port}$"):
        EngineListener("127.0.0.1", port, leader)()


def test_one_that_takes_the_port_later(start: Callable[..., tuple[int, int]]) -> None:
    """The engine was known, died, and its port is another's now."""
    leader, port = start()
    listener = EngineListener("127.0.0.1", port, leader)
    listener()
    os.kill(leader, signal.SIGKILL)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ConnectionRefusedError):
        listener()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ForeignListenerError, match=re.escape(this_process())),
    ):
        listener()


def test_a_socket_that_no_process_has_open(
    start: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine ends at this moment: the socket has no owner, and no program is named, unless it is another user's."""
    leader, port = start()
    monkeypatch.setattr(listener_module, "_files", lambda pid: iter(()))
    with pytest.raises(ConnectionRefusedError, match=r"^no process has the socket open that listens on port "):
        EngineListener("127.0.0.1", port, leader)()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ForeignListenerError, match="is listened on by a program of user "):
        EngineListener("127.0.0.1", port, leader)()


def test_several_on_one_port_must_all_be_its_own(start: Callable[..., tuple[int, int]]) -> None:
    """SO_REUSEPORT: the kernel chooses one for each connection."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0), reuse_port=True))
        port = first.getsockname()[1]
        EngineListener("127.0.0.1", port, os.getpid())()
        code = f"import socket,time; s=socket.create_server(('127.0.0.1',{port}),reuse_port=True); print(1,flush=True); time.sleep(60)"
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
        stack.callback(other.wait)
        stack.callback(other.kill)
        assert other.stdout is not None
        with other.stdout:
            other.stdout.readline()
        with pytest.raises(ForeignListenerError, match=rf"pid {os.getpid()}|pid {other.pid}"):
            EngineListener("127.0.0.1", port, other.pid)()


def test_an_exact_address_goes_before_a_wildcard() -> None:
    listeners = [
        Listener(address, 80, inode, 0, "tcp") for inode, address in enumerate(["::", "0.0.0.0", "127.0.0.1", "::1"])
    ]
    assert [each.address for each in reached("127.0.0.1", listeners)] == ["127.0.0.1"]
    assert [each.address for each in reached("127.0.0.2", listeners)] == ["0.0.0.0"]
    assert [each.address for each in reached("127.0.0.2", listeners[:1])] == ["::"]
    assert [each.address for each in reached("::1", listeners)] == ["::1"]
    assert [each.address for each in reached("::1", listeners[1:3])] == []


def test_a_key_is_sent_to_nobody_else(start: Callable[..., tuple[int, int]]) -> None:
    leader, _ = start()
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
        find = EngineListener("127.0.0.1", port, leader)
        with pytest.raises(ForeignListenerError):
            request(("127.0.0.1", port), "/v1/models", api_key=KEY, timeout=5, listener=find)
        thief.settimeout(0.2)
        with pytest.raises(TimeoutError):
            thief.accept()


def test_nothing_is_sent_where_the_socket_changes_while_it_is_connected_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        address = thief.getsockname()
        inodes = iter([1, 2])
        with pytest.raises(ConnectionError, match=r"^another socket took the port while it was connected to$"):
            request(address, "/v1/models", api_key=KEY, timeout=5, listener=lambda: (address, next(inodes)))
        connection, _ = thief.accept()
        with connection:
            assert connection.recv(4096) == b""
