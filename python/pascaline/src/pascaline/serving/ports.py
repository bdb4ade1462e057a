"""Binds ports, and finds the process that holds a port that is not free."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pascaline.errors import ConfigurationError, PortInUseError

LISTEN_STATE = "0A"
"""State of a listening socket in /proc/net/tcp (include/net/tcp_states.h)."""


def bind(host: str, port: int, purpose: str, setting: str) -> socket.socket:
    """Return a socket bound to a TCP port. purpose, setting: names for messages.

    Raises PortInUseError, which names the process that holds the port if this user can see it, and ConfigurationError
    if the host does not resolve or the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigurationError(
            f"{setting.replace('port', 'host')}: failed to resolve {host!r}: {error.strerror}"
        ) from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno != 98:  # EADDRINUSE on Linux
            raise ConfigurationError(f"{setting}: failed to listen on {host}:{port}: {error.strerror}") from error
        holder = port_holder(port)
        held = f" by {holder}" if holder else ""
        raise PortInUseError(
            f"{setting}: port {port} for the {purpose} is in use{held}; "
            f"stop that process, or set {setting} to a free port"
        ) from error
    return bound


def bind_unix(path: Path) -> socket.socket:
    """Return a Unix socket that only this user may open; replaces an existing file, except a socket that is in use.

    Raises PortInUseError if somebody listens on it, and OSError.
    """
    _check_stale(path)
    path.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # On Linux the file that bind creates gets the socket's mode at once.
    os.fchmod(bound.fileno(), 0o600)
    try:
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    return bound


def _check_stale(path: Path) -> None:
    """Raise PortInUseError if somebody listens on a Unix socket of this name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(path))
        except BlockingIOError:
            pass  # its queue is full, so somebody listens
        except OSError:
            return
    raise PortInUseError(f"{path}: another process listens on this socket; stop it, or give it a folder of its own")


def check_free(host: str, port: int, purpose: str, setting: str) -> None:
    """Raise PortInUseError if another process listens on the port; other errors as in `bind`."""
    bind(host, port, purpose, setting).close()


def port_holder(port: int) -> str | None:
    """Return "name (pid N)" of the process that listens on a TCP port; None if this user sees no such process."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in wanted for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTEN_STATE and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(fields[9])
    return inodes
