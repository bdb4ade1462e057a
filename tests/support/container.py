"""A Debian root that boots its own systemd in new namespaces: for tests of units without a virtual machine. Needs root.

The root file system is an overlay over a cached image, so that a container's changes live as long as its folder and never
reach the image. It has its own network (loopback only, unless it is given one with others), processes and control groups;
/sys and /proc/sys are read-only, so that nothing of the host is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from support.network import Network

RELEASE = "trixie"
"""systemd 257: the nearest that Debian has to NixOS 26.05, and the first series with all keys of our units."""
PACKAGES = ("systemd", "systemd-sysv", "dbus", "iproute2", "python3", "curl", "libgomp1")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascaline" / "systemd"
BOOT_SECONDS = 60.0
STOP_SECONDS = 120.0
PATIENCE_SECONDS = 60.0

_BOOT = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -o bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
  touch dev/$device
  mount --bind /dev/$device dev/$device
done
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
while read -r source target; do
  mount --bind -o ro "$source" ".$target"
done <"$2/binds"
pivot_root . .
umount -l .
# As container managers do: systemd passes credentials to units by mounts that propagate.
mount --make-rshared /
exec env -i container=pascaline-test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /sbin/init
"""


def image() -> Path:
    """Return the cached image. Make it if it is missing (two minutes); skip the test if that fails."""
    if os.geteuid() != 0:
        pytest.skip("booting a container needs root")
    for program in ("unshare", "nsenter", "pivot_root", "setpriv"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine (Debian: apt install util-linux)")
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine allows no new namespaces")
    found = CACHE / RELEASE
    if not found.is_dir():
        make_image(found, PACKAGES)
    return found


def make_image(target: Path, packages: Sequence[str]) -> None:
    """Put Debian with these packages into a folder that does not exist yet; skip the test if that fails."""
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is not on this machine (Debian: apt install debootstrap)")
    partial = target.with_suffix(f".{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", RELEASE, str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        shutil.rmtree(partial / "var/cache/apt", ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass
class Container:
    """One such root; `folder` holds its changes."""

    folder: Path
    binds: dict[str, Path] = field(default_factory=dict)
    """Read-only: path inside -> file or folder of the host."""
    network: Network | None = None
    address: str = ""
    """In the network, from each boot on."""
    _process: subprocess.Popen[bytes] | None = None
    _init: int = 0

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the root, before it boots."""
        target = self._upper(path)
        target.write_text(text)
        target.chmod(mode)

    def link(self, path: str, target: str) -> None:
        """Make a symbolic link in the root, before it boots."""
        self._upper(path).symlink_to(target)

    def copy(self, tree: Path) -> None:
        """Lay a folder over the root, symbolic links kept, before it boots."""
        shutil.copytree(tree, self.folder / "upper", symlinks=True, dirs_exist_ok=True)

    def boot(self) -> None:
        """Start systemd and wait until its basic services run; units may still be starting."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for inside, source in self.binds.items():
            point = self._upper(inside)
            if source.is_dir():
                point.mkdir(exist_ok=True)
            else:
                point.touch()
        (self.folder / "binds").write_text("".join(f"{source} {inside}\n" for inside, source in self.binds.items()))
        spaces = ("--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net")
        command = [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", *spaces),
            *("--propagation", "private", "sh", "-c", _BOOT, "sh", str(image()), str(self.folder)),
        ]
        with (self.folder / "console").open("ab") as console:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        wait_until(self._has_init, BOOT_SECONDS, lambda: f"no systemd: {self._console()}")
        if self.network is not None:
            self.network.plug_in(self._init, self.address)
        wait_until(
            lambda: self._state() in {"starting", "running", "degraded"}, BOOT_SECONDS, lambda: f"state {self._state()}"
        )

    @property
    def is_booted(self) -> bool:
        return self._process is not None

    def shut_down(self) -> None:
        """Power off, as a person would, and wait for the end."""
        assert self._process is not None
        self.run("systemctl", "--no-block", "poweroff", check=False)
        self._process.wait(STOP_SECONDS)
        self._process = None

    def kill(self) -> None:
        """End it at once; do nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def run(self, *command: str, check: bool = True, timeout: float = STOP_SECONDS) -> str:
        """Run a command inside as root; return its output, standard error included."""
        enter = ["nsenter", "--target", str(self._init), "--all", *command]
        done = subprocess.run(
            enter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def popen(self, *command: str) -> subprocess.Popen[str]:
        """Start a command inside as root; its output is a pipe."""
        enter = ["nsenter", "--target", str(self._init), "--all", *command]
        return subprocess.Popen(enter, stdout=subprocess.PIPE, text=True)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit)

    def journal(self, unit: str) -> str:
        """Return what a unit has written in this boot."""
        return self.run("journalctl", "--no-pager", "--boot", "--output", "cat", "--unit", unit)

    def request(self, url: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
        """Ask an HTTP server inside; return status (0: no answer) and body."""
        arguments = ["--silent", "--max-time", "30", "--write-out", "\n%{http_code}"]
        if body is not None:
            arguments += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        if key is not None:
            arguments += ["--header", f"Authorization: Bearer {key}"]
        text, _, status = self.run("curl", *arguments, url, check=False).rpartition("\n")
        return int(status), text

    def _upper(self, path: str) -> Path:
        target = self.folder / "upper" / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _has_init(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the container ended: {self._console()}"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._init = int(children[0]) if children else 0
        return bool(children) and Path(f"/proc/{self._init}/comm").read_text() == "systemd\n"

    def _state(self) -> str:
        return self.run("systemctl", "is-system-running", check=False).splitlines()[-1]

    def _console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")[-2000:]


def wait_until(
    condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS, explain: Callable[[], str] = lambda: ""
) -> None:
    """Return as soon as the condition holds; fail with the explanation if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {explain()}"
        time.sleep(0.1)
