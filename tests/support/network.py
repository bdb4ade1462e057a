"""A network of containers: a switch in a network namespace of its own, and a cable from it to each. Needs root and iproute2."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWITCH = "ip link add switch type bridge && ip link set switch up && echo made && exec sleep infinity"


@dataclass
class Network:
    """It ends with `close`, or with this process; the machine's own network is not touched."""

    _switch: subprocess.Popen[str] = field(init=False)
    _ports: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if shutil.which("ip") is None:
            pytest.skip("ip is not on this machine (Debian: apt install iproute2)")
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", _SWITCH]
        self._switch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._switch.stdout
        if (answer := self._switch.stdout.readline().strip()) != "made":
            self.close()
            pytest.skip(f"this machine makes no bridge in a new network namespace: {answer}")

    def plug_in(self, process: int, address: str) -> None:
        """Give the network namespace of a process an interface eth1 with this address."""
        port = f"port{next(self._ports)}"
        self._ip(self._switch.pid, f"link add {port} type veth peer name eth1 netns {process}")
        self._ip(self._switch.pid, f"link set {port} up master switch")
        self._ip(process, f"address add {address}/24 dev eth1")
        self._ip(process, "link set eth1 up")

    def close(self) -> None:
        self._switch.kill()
        self._switch.communicate()

    def _ip(self, process: int, arguments: str) -> None:
        command = ["nsenter", "--target", str(process), "--net", "ip", *arguments.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, f"ip {arguments}: {done.stdout}"
