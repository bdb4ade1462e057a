"""Both commands of the README on a Debian that has nothing but python3 and ca-certificates, from a clone, without caches.

The root file system is an overlay over an image by debootstrap, in mount and process namespaces of its own; it has the
machine's network, certificates and settings of package indexes, and nothing else of the machine. The commands run as an
ordinary user; with `PASCALINE_BARE_USER=root` in the environment they run as root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from support.checkout import clone

if TYPE_CHECKING:
    from collections.abc import Iterator

RELEASE = "bookworm"
"""Debian 12, whose python3 is 3.11."""
IMAGE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascaline" / "bare" / RELEASE
USER = os.environ.get("PASCALINE_BARE_USER", "visitor")
UID, HOME = {"visitor": (1000, "/home/visitor"), "root": (0, "/root")}[USER]
SERVE_SECONDS = 1200.0
TEST_SECONDS = 3000.0
WORKERS = 3
"""As many processes as leave the tests around them their share of two cores."""
WAYS_OUT = re.compile(r"(PIP|UV)_(?!FIND_LINKS|CACHE_DIR|PYTHON).*|.*_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE")
"""Variables by which this machine reaches package indexes."""
FILES_OUT = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")

pytestmark = [
    pytest.mark.slow("installs everything anew on a bare Debian and runs `./dev serve` and `./dev test` there"),
    pytest.mark.timeout(SERVE_SECONDS + TEST_SECONDS + 900),
]

_ENTER = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
  touch dev/$device
  mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
pivot_root . .
umount -l .
user=$3 uid=$4 home=$5 path=/usr/local/bin:/usr/bin:/bin
[ "$uid" != 0 ] || path=/usr/local/sbin:/usr/sbin:/sbin:$path
shift 5
cd "$home/pascaline"
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups env -i HOME="$home" USER="$user" \
  PATH="$path" "$@"
"""


def make_image() -> None:
    """Build the image unless it is there (two minutes); skip the test if it cannot be built."""
    if IMAGE.is_dir():
        return
    if shutil.which("debootstrap") is None:
        pytest.skip("debootstrap is not on this machine (Debian: apt install debootstrap)")
    partial = IMAGE.with_suffix(f".{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = ["debootstrap", "--variant=minbase", "--include=python3,ca-certificates", RELEASE, str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            pytest.skip(f"debootstrap failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        partial.rename(IMAGE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class BareMachine:
    """The root with a clone in the home folder of the user."""

    def __init__(self, folder: Path) -> None:
        """Lay out the changes over the image in a folder."""
        self.folder = folder
        for name in ("upper", "work", "root"):
            (folder / name).mkdir()
        upper = folder / "upper"
        for name in FILES_OUT:
            if Path(name).is_file():
                (upper / name[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(name, upper / name[1:])
        for settings in Path("/etc/apt/apt.conf.d").glob("*"):
            if "Acquire" in settings.read_text():
                (upper / "etc/apt/apt.conf.d").mkdir(parents=True, exist_ok=True)
                shutil.copy(settings, upper / "etc/apt/apt.conf.d")
        if UID:
            passwd = f"{(IMAGE / 'etc/passwd').read_text()}{USER}:x:{UID}:{UID}::{HOME}:/bin/sh\n"
            (upper / "etc/passwd").write_text(passwd)
            (upper / "etc/group").write_text(f"{(IMAGE / 'etc/group').read_text()}{USER}:x:{UID}:\n")
        self.clone = clone(upper / HOME[1:] / "pascaline")
        subprocess.run(["chown", "-R", f"{UID}:{UID}", str(upper / HOME[1:])], check=True)

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another one in the clone, as the user."""
        out = [f"{name}={value}" for name, value in os.environ.items() if WAYS_OUT.fullmatch(name)]
        return [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("--propagation", "private", "sh", "-c", _ENTER, "sh"),
            *(str(IMAGE), str(self.folder), USER, str(UID), HOME, *out, *arguments),
        ]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareMachine]:
    """A bare machine; its 7 GB are deleted at the end."""
    if os.geteuid() != 0:
        pytest.skip("a root file system of its own needs root")
    for program in ("unshare", "setpriv", "pivot_root"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine (Debian: apt install util-linux)")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine allows no new namespaces")
    make_image()
    folder = tmp_path_factory.mktemp("bare")
    yield BareMachine(folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_serve_answers_from_a_clone(machine: BareMachine) -> None:
    """`./dev serve` as the README has it: installs, prints a command that gets the answer, and ends on Ctrl-C."""
    log = machine.folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(machine.command("./dev", "serve"), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SERVE_SECONDS
        while not (line := re.search(r"^  try    (curl .*)$", log.read_text(errors="replace"), re.MULTILINE)):
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        assert ask(shlex.split(line[1])).startswith("The capital of France is Paris.")
        interrupt(process, "pascaline")
        assert process.wait(120) == 0, log.read_text(errors="replace")[-4000:]
    finally:
        process.kill()
        process.wait()


def ask(curl: list[str]) -> str:
    """Do what the printed curl command does; return the model's words."""
    (address,) = (argument for argument in curl if argument.startswith("http://"))
    body = curl[curl.index("-d") + 1].encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def interrupt(process: subprocess.Popen[bytes], name: str) -> None:
    """Press Ctrl-C: the program is a descendant, in a process namespace of its own."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if Path(child.cmdline()[1] if len(child.cmdline()) > 1 else "").name == name:
            child.send_signal(signal.SIGINT)
            return
    raise AssertionError(f"no process {name} among the descendants")


def test_the_fast_tests_pass_in_a_clone(machine: BareMachine) -> None:
    """`./dev test` as the README has it; what it skips, it skips with a line that says how to get it.

    This machine runs all other tests meanwhile: what fails beside them is run once more alone, as CI does.
    """
    code, text = run(machine, f"PASCALINE_TEST_WORKERS={WORKERS}", "./dev", "test")
    assert "tests left out (./dev test --all runs them)" in text, text[-8000:]
    if code == 1:
        print(text[-8000:])
        code, text = run(machine, "./dev", "test", "--again")
    assert code == 0, text[-8000:]
    assert re.search(r"\d+ passed", text.splitlines()[-1])
    assert "Success: no issues found" in text  # the type checker, beside the tests


def run(machine: BareMachine, *command: str) -> tuple[int, str]:
    """Run a command in the clone; return its exit code and what it printed."""
    done = subprocess.run(
        machine.command(*command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TEST_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")
