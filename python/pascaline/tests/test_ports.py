"""Ports: bound or refused, with the name of who holds them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.errors import ConfigurationError, PortInUseError
from pascaline.serving.ports import bind, bind_unix, check_free, port_holder
from support.ports import this_process

IPV6 = Path("/proc/net/if_inet6").exists() and "lo" in Path("/proc/net/if_inet6").read_text()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "0.0.0.0",
        "localhost",
        pytest.param("::1", marks=pytest.mark.skipif(not IPV6, reason="no IPv6 loopback")),
    ],
)
def test_a_free_port_is_bound(host: str) -> None:
    with bind(host, 0, "agent", "agent_port") as bound:
        assert bound.getsockname()[1] > 0


@pytest.mark.parametrize("listening_on", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_names_its_holder(listening_on: str) -> None:
    with socket.create_server((listening_on, 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUseError) as raised:
            check_free("127.0.0.1", port, "engine", "port")
    assert str(raised.value) == (
        f"port: port {port} for the engine is in use by {this_process()}; stop that process, or set port to a free port"
    )


def test_a_port_of_another_process(tmp_path: Path) -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        port = int(other.stdout.readline())
        name = Path(f"/proc/{other.pid}/comm").read_text().strip()
        assert port_holder(port) == f"{name} (pid {other.pid})"
        other.communicate("\n")
    assert port_holder(port) is None


def test_a_port_that_was_just_left_can_be_bound_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0]:
            client.sendall(b"x")
    check_free("127.0.0.1", port, "engine", "port")


def test_an_address_of_another_host() -> None:
    with pytest.raises(ConfigurationError) as raised:
        check_free("192.0.2.1", 8080, "engine", "port")
    assert str(raised.value) == "port: failed to listen on 192.0.2.1:8080: Cannot assign requested address"


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"^agent_host: failed to resolve 'no such host': "):
        check_free("no such host", 8080, "agent", "agent_port")


def test_a_unix_socket_that_is_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    bind_unix(path).close()
    assert path.is_socket()
    with bind_unix(path) as bound:
        bound.listen(1)
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("waiting", [0, 5])
def test_a_unix_socket_that_is_in_use_stays(tmp_path: Path, waiting: int) -> None:
    """Also if too many connections wait for another one to be accepted."""
    path = tmp_path / "agent.sock"
    with bind_unix(path) as listening, contextlib.ExitStack() as stack:
        listening.listen(1)
        for _ in range(waiting):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        inode = path.stat().st_ino
        with pytest.raises(PortInUseError) as raised:
            bind_unix(path)
        assert path.stat().st_ino == inode
    assert str(raised.value) == (
        f"{path}: another process listens on this socket; stop it, or give it a folder of its own"
    )


def test_a_file_in_place_of_the_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    path.write_text("")
    with bind_unix(path):
        assert path.is_socket()
