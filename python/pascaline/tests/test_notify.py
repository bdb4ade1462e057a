"""sd_notify over real datagram sockets, with a name in the file system and without."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
from pascaline.serving.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Manager:
    """A socket that reads when it is asked to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def messages(self) -> list[str]:
        found = []
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@pascaline-test-{os.getpid()}"
    found = Manager(address)
    yield found
    found.socket.close()


def test_every_message(manager: Manager) -> None:
    notifier = Notifier(manager.address, watchdog_seconds=30.0)
    notifier.extend_timeout(1.5)
    notifier.status("loading\nthe model")
    notifier.ready()
    notifier.watchdog()
    notifier.stopping()
    assert manager.messages() == [
        "EXTEND_TIMEOUT_USEC=1500000",
        "STATUS=loading the model",
        "READY=1",
        "WATCHDOG=1",
        "STOPPING=1",
    ]


def test_without_a_watchdog_none_is_fed(manager: Manager) -> None:
    Notifier(manager.address, watchdog_seconds=None).watchdog()
    assert manager.messages() == []


def test_a_manager_that_reads_late_gets_what_it_missed_with_the_next_message(manager: Manager) -> None:
    notifier = Notifier(manager.address, watchdog_seconds=30.0)
    sent = 0
    # More than any system's net.unix.max_dgram_qlen lets wait.
    while sent < 10_000 and not notifier._unsent:
        notifier.watchdog()
        sent += 1
    assert notifier._unsent, "the queue never filled up"
    notifier.ready()
    notifier.status("ready")
    notifier.status("busy")
    assert set(manager.messages()) == {"WATCHDOG=1"}
    notifier.watchdog()
    notifier.watchdog()
    assert manager.messages() == ["WATCHDOG=1\nREADY=1\nSTATUS=busy", "WATCHDOG=1"]


def test_a_manager_that_is_restarted_gets_what_it_missed(tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "notify"), watchdog_seconds=None)
    notifier.ready()
    manager = Manager(str(tmp_path / "notify"))
    notifier.status("ready")
    assert manager.messages() == ["READY=1\nSTATUS=ready"]
    manager.socket.close()


@pytest.mark.parametrize("text", ["x" * 10**6, "\x00" * 10**6, "é" * 10**6, "\udcff" * 10**6])
def test_a_long_status_is_cut_so_that_systemd_takes_it(manager: Manager, text: str) -> None:
    """Beyond 4096 bytes systemd ignores the whole datagram; beyond the socket's buffer nothing would ever be sent again."""
    notifier = Notifier(manager.address, watchdog_seconds=30.0)
    notifier.status(f"failed: {text}")
    notifier.watchdog()
    status, watchdog = manager.messages()
    assert status.startswith("STATUS=failed: ")
    assert 1900 < len(status.encode()) < 2100
    assert watchdog == "WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, None)),
        ({"NOTIFY_SOCKET": "/run/notify"}, ("/run/notify", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "2500000"}, ("@n", 2.5)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, ("@n", 2.5)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, ("@n", None)),
        ({"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "soon"}, ("@n", None)),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], expected: tuple[str | None, float | None]) -> None:
    notifier = Notifier.from_environment(environment)
    assert (notifier.address, notifier.watchdog_seconds) == expected


def test_nothing_happens_without_a_manager() -> None:
    notifier = Notifier(None, None)
    notifier.ready()
    notifier.stopping()
    assert notifier._unsent == {}
