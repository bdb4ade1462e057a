"""Checks that the engine's own processes listen on its port, before a key is sent there or an answer is believed.

Otherwise a program that takes the port between two runs of the engine would receive the API key and pass as the engine.
The kernel shows which process holds a listening socket: /proc/net/tcp and tcp6 hold its inode (proc_pid_net(5)), and
/proc/PID/fd the processes that have it open. Both are read again for each request.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.engines.client import reachable
from pascaline.serving.ports import LISTEN_STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

PROC = Path("/proc")
_GONE_OR_FORBIDDEN = (FileNotFoundError, ProcessLookupError, PermissionError)


class ForeignListenerError(ConnectionError):
    """Another program listens on the engine's port."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket."""

    address: str
    port: int
    inode: int
    uid: int
    table: str
    """`tcp` or `tcp6`."""


class EngineListener:
    """The listening socket of one run of an engine; each call searches for it again."""

    def __init__(self, host: str, port: int, leader: int) -> None:
        """host, port: the engine's configured address. leader: process id of the engine, which leads its session."""
        self._host, self._port = reachable((host, port))
        self._leader = leader
        self._owner: tuple[Path, int] | None = None
        """The file descriptor that was the engine's socket at the last search, and the socket's inode."""

    def __call__(self) -> tuple[tuple[str, int], int]:
        """Return ((numeric address, port), inode) of the socket that a connection reaches.

        Raises ConnectionRefusedError if nothing listens there, and ForeignListenerError if another program does.
        """
        listening = list(_listening(self._port))
        for address in _numeric(self._host, self._port):
            if found := reached(address, listening):
                self._check_owner(found)
                return (address, self._port), found[0].inode
        raise ConnectionRefusedError(f"nothing listens on {self._host} port {self._port}")

    def _check_owner(self, listeners: list[Listener]) -> None:
        """Raise ForeignListenerError unless all are the engine's: if several share a port, any may be reached."""
        for listener in listeners:
            if self._owner is None or self._owner[1] != listener.inode or not _is_open(*self._owner):
                self._owner = self._owned(listener)
            if self._owner is None:
                raise self._complaint(listener)

    def _complaint(self, listener: Listener) -> ConnectionError:
        found = holder(listener)
        if found is None and listener.uid == os.getuid():
            # The engine may be ending at this moment: its file descriptors close before its socket does.
            return ConnectionRefusedError(f"no process has the socket open that listens on port {self._port}")
        return ForeignListenerError(
            f"port {self._port} is listened on by {found or _user(listener.uid)}, which is no process of the engine "
            f"(pid {self._leader}); stop that process, or set port to a free port"
        )

    def _owned(self, listener: Listener) -> tuple[Path, int] | None:
        # The engine itself first: searching every process of a busy host takes time.
        for pid in itertools.chain((self._leader,), _processes()):
            if _belongs(pid, self._leader):
                for file in _files(pid):
                    if _is_open(file, listener.inode):
                        return file, listener.inode
        return None


def reached(address: str, listeners: list[Listener]) -> list[Listener]:
    """Return the listeners that a connection to a numeric address may reach: an exact address wins over a wildcard."""
    target = ip_address(address)
    for wanted in (str(target), "0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        if isinstance(target, IPv6Address) and wanted == "0.0.0.0":  # noqa: S104
            continue
        if found := [each for each in listeners if each.address == wanted]:
            return found
    return []


def holder(listener: Listener) -> str | None:
    """Return "program (pid N)" of a process that has the socket open; None if this user cannot see it."""
    for pid in _processes():
        if any(_is_open(file, listener.inode) for file in _files(pid)):
            with contextlib.suppress(*_GONE_OR_FORBIDDEN):
                return f"{(PROC / str(pid) / 'comm').read_text().strip()} (pid {pid})"
    return None


def _user(uid: int) -> str:
    try:
        return f"a program of user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"a program of user {uid}"


def _numeric(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionError(f"failed to resolve {host!r}: {error.strerror}") from error
    # A name's zone, as in fe80::1%eth0, is not in the kernel's table.
    return list(dict.fromkeys(str(each[4][0]).partition("%")[0] for each in found))


def _listening(port: int) -> Iterator[Listener]:
    for table in ("tcp", "tcp6"):
        # Without IPv6 there is no tcp6. Other errors, such as no free file descriptor, are raised.
        with contextlib.suppress(FileNotFoundError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                address, _, hex_port = fields[1].rpartition(":")
                if fields[3] == LISTEN_STATE and int(hex_port, 16) == port:
                    yield Listener(_decoded(address), port, int(fields[9]), int(fields[7]), table)


def _decoded(text: str) -> str:
    """Decode an address of the kernel's tables: 32-bit words in the machine's byte order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    address = ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _processes() -> Iterator[int]:
    yield from (int(path.name) for path in PROC.glob("[0-9]*"))


def _files(pid: int) -> Iterator[Path]:
    with contextlib.suppress(*_GONE_OR_FORBIDDEN):
        yield from (PROC / str(pid) / "fd").iterdir()


def _is_open(file: Path, inode: int) -> bool:
    try:
        return str(file.readlink()) == f"socket:[{inode}]"
    except OSError:
        return False


def _belongs(pid: int, leader: int) -> bool:
    """Whether a process is in the session that the engine leads, or descends from it."""
    for _ in range(64):
        try:
            # After the name, which may contain anything: state, parent, group, session.
            fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except _GONE_OR_FORBIDDEN:
            return False
        if leader in (pid, int(fields[3])):
            return True
        if (pid := int(fields[1])) <= 1:
            return False
    return False
