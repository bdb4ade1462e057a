"""The Debian root of the containers in a virtual machine of QEMU: with a kernel, a boot and a shutdown of its own. Needs root.

No KVM is asked for: QEMU interprets, some twenty times slower than the machine that it runs on. Commands go in by a port of the
machine's own, which a small service inside reads; folders of the environment are shared, read-only.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.container import CACHE, PACKAGES, RELEASE, Container, make_image, wait_until

PATIENCE = 20
"""How much longer everything may take than in a container."""
QEMU = "qemu-system-x86_64"
BOOT_SECONDS = 1800.0
MEMORY_MIB = 3072
DISK_MIB = 4096
SHARED_BYTES = 64 * 2**20
"""Folders above this size are shared with the machine instead of copied onto its disk."""
_PORT = "pascaline.agent"
_AGENT = f"""
import json, os, subprocess, time
port = os.open("/dev/virtio-ports/{_PORT}", os.O_RDWR)
waiting = b""
while True:
    waiting += os.read(port, 65536)
    line, end, rest = waiting.partition(b"\\n")
    if not end:
        time.sleep(0.1)
        continue
    waiting = rest
    done = subprocess.run(json.loads(line), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    answer = memoryview(json.dumps([done.returncode, done.stdout.decode(errors="replace")]).encode() + b"\\n")
    while answer:
        answer = answer[os.write(port, answer):]
"""
_AGENT_UNIT = """
[Unit]
Description=Commands of the test
[Service]
ExecStart=/usr/bin/python3 /opt/agent.py
Restart=always
RestartSec=1
"""


def machine_image() -> Path:
    """Return the cached root with a kernel. Make it if it is missing (minutes); skip the test if that fails."""
    for program in (QEMU, "mke2fs"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine (Debian: apt install qemu-system-x86 e2fsprogs)")
    found = CACHE / f"{RELEASE}-kernel"
    if not found.is_dir():
        make_image(found, (*PACKAGES, "linux-image-amd64"))
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass
class VirtualMachine(Container):
    """The container's root on a disk of its own, which outlives a shutdown."""

    _port: socket.socket | None = None

    def boot(self) -> None:
        """Start the machine and wait until its systemd answers; units may still be starting."""
        shares = {inside: path for inside, path in self.binds.items() if path.is_dir() and _size(path) > SHARED_BYTES}
        if not self._disk.exists():
            self._make_disk(shares)
        with (self.folder / "console").open("ab") as console:
            self._process = subprocess.Popen(
                self._command(list(shares.values())), stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )
        wait_until(self._is_connected, BOOT_SECONDS, lambda: f"no agent: {self._console()}")
        wait_until(
            lambda: self._state() in {"starting", "running", "degraded"}, BOOT_SECONDS, lambda: f"state {self._state()}"
        )

    def run(self, *command: str, check: bool = True, timeout: float = BOOT_SECONDS) -> str:
        """Run a command inside as root; return its output, standard error included."""
        assert self._port is not None
        self._port.settimeout(timeout)
        self._port.sendall(json.dumps(command).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._port.recv(65536)
            assert part, f"the machine ended: {self._console()}"
            answer += part
        code, output = json.loads(answer)
        assert not check or code == 0, f"{' '.join(command)}: exit code {code}\n{output}"
        return str(output).strip()

    def shut_down(self) -> None:
        """Power off, as a person would, and wait for the end."""
        assert self._process is not None
        self.run("systemctl", "--no-block", "poweroff", check=False)
        self._process.wait(BOOT_SECONDS)
        self._process = None
        self._disconnect()

    def kill(self) -> None:
        """End it at once; do nothing if it does not run."""
        super().kill()
        self._disconnect()

    @property
    def _disk(self) -> Path:
        return self.folder / "disk.ext4"

    def _command(self, shares: list[Path]) -> list[str]:
        [kernel] = (self.folder / "boot").glob("vmlinuz-*")
        [initrd] = (self.folder / "boot").glob("initrd.img-*")
        folders = [
            part
            for number, path in enumerate(shares)
            for part in ("-virtfs", f"local,path={path},mount_tag=share{number},security_model=none,readonly=on")
        ]
        return [
            *(QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
            *("-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot", "-nic", "none"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", "root=/dev/vda rw console=ttyS0 quiet"),
            *("-drive", f"file={self._disk},format=raw,if=virtio", "-device", "virtio-serial"),
            *("-chardev", f"socket,id=agent,path={self.folder / 'agent'},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=agent,name={_PORT}", *folders),
        ]

    def _make_disk(self, shares: dict[str, Path]) -> None:
        """Lay image, changes and small folders onto a disk; the large folders are mounted where they are named."""
        root = self.folder / "root"
        subprocess.run(["cp", "--archive", machine_image(), root], check=True)
        (self.folder / "boot").mkdir()
        for file in (*root.glob("boot/vmlinuz-*"), *root.glob("boot/initrd.img-*")):
            shutil.copy2(file, self.folder / "boot")
        self.write("/opt/agent.py", _AGENT)
        self.write("/etc/systemd/system/agent.service", _AGENT_UNIT)
        self.write("/etc/modules-load.d/shares.conf", "9pnet_virtio\n")
        self._upper("/etc/systemd/system/multi-user.target.wants/agent.service").symlink_to("../agent.service")
        lines = ["/dev/vda / ext4 defaults 0 1"]
        for number, inside in enumerate(shares):
            (root / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
            lines.append(f"share{number} {inside} 9p trans=virtio,version=9p2000.L,ro,msize=262144,cache=loose 0 0")
        self.write("/etc/fstab", "\n".join(lines) + "\n")
        shutil.copytree(self.folder / "upper", root, symlinks=True, dirs_exist_ok=True)
        for inside, path in self.binds.items():
            if inside not in shares:
                self._copy(path, root / inside.lstrip("/"))
        command = ["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(self._disk), f"{DISK_MIB}M"]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(root)

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)

    def _is_connected(self) -> bool:
        """Whether the service inside answers; what was sent before it ran, it finds when it starts."""
        assert self._process is not None
        assert self._process.poll() is None, f"the machine ended: {self._console()}"
        if self._port is None:
            self._port = socket.socket(socket.AF_UNIX)
            try:
                self._port.connect(str(self.folder / "agent"))
            except OSError:
                self._disconnect()
                time.sleep(1)
                return False
        return self.run("true") == ""

    def _disconnect(self) -> None:
        if self._port is not None:
            self._port.close()
        self._port = None


def as_machine(container: Container) -> Any:
    """Return the same root and binds as a virtual machine."""
    return VirtualMachine(container.folder, container.binds)
