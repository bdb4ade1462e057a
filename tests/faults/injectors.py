"""What brings a fault about, as functions of a scene. Each acts on a running instance, or prepares one that will start."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from faults.noise import send_noise
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from support.instance import PATIENCE, wait_until
from support.ledger import stretch

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.scene import Scene

    Inject = Callable[[Scene], None]

ONE_P4 = """
[library]
nvmlSystemGetDriverVersion = 580.105.08
[gpu 0]
nvmlDeviceGetUUID = GPU-aaaa
nvmlDeviceGetName = Tesla P4
nvmlDeviceGetPciInfo = 00000000:01:00.0 0x1BB310DE 0x11D810DE
nvmlDeviceGetMemoryInfo_v2 = 8053063680 76546048 7976517632 0
"""
LOST_P4 = ONE_P4 + "[gpu 0]\nall = error GPU_IS_LOST\n"


def nothing(_: Scene) -> None:
    """The fault is there from the start, or is no fault."""


def both(*injectors: Inject) -> Inject:
    """One after the other."""

    def inject(scene: Scene) -> None:
        for each in injectors:
            each(scene)

    return inject


def wait(seconds: float) -> Inject:
    """A pause between two."""
    return lambda _: time.sleep(seconds)


def until(part: str) -> Inject:
    """Wait for a line of the log."""
    return lambda scene: scene.instance.wait_for_line(part, PATIENCE * stretch()) and None


# --- processes --------------------------------------------------------------------------------------------------------


def signal_engine(name: str) -> Inject:
    """Send a signal to the engine's first process."""
    return lambda scene: scene.engine().send_signal(signal.Signals[name])


def signal_worker(name: str) -> Inject:
    """Send a signal to the process that plays the scheduler."""
    return lambda scene: scene.worker().send_signal(signal.Signals[name])


def signal_supervisor(name: str) -> Inject:
    """Send a signal to pascaline."""
    return lambda scene: scene.signal(name)


def pause(seconds: float, *whom: str) -> Inject:
    """Stop processes for a while, as a debugger, a hypervisor or a suspend does."""

    def inject(scene: Scene) -> None:
        found = {
            "supervisor": lambda: psutil.Process(scene.instance.process.pid),
            "engine": scene.engine,
            "worker": scene.worker,
        }
        processes = [found[each]() for each in whom]
        for process in reversed(processes):
            process.suspend()
        time.sleep(seconds)
        for process in reversed(processes):
            process.resume()

    return inject


def tell(**values: Any) -> Inject:
    """Change what the fake engine does."""
    return lambda scene: scene.tell(**values)


def answer(path: str, text: str, **values: Any) -> Inject:
    """Let the engine answer a path with these characters."""
    return tell(raw_path=path, raw_answer=text, **values)


def ok(body: str) -> str:
    """Return a whole HTTP answer."""
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"


def next_start(faults: str) -> Inject:
    """Let the next run of the engine have these faults; `write_next` changes them."""

    def prepare(scene: Scene) -> None:
        scene.environment["FAKE_ENGINE_FILE"] = str(scene.folder / "engine.faults")
        scene.notes["next"] = faults

    return prepare


def crash_into_next(scene: Scene) -> None:
    """Crash; the next run has the faults that `next_start` named."""
    write_next(scene.notes["next"])(scene)
    scene.tell(crash_now=1)


def write_next(faults: str) -> Inject:
    """Change the faults of the next run."""
    return lambda scene: (scene.folder / "engine.faults").write_text(faults) and None


# --- the host ---------------------------------------------------------------------------------------------------------


def own_mount(options: str) -> Inject:
    """Give the instance a file system of its own at FOLDER/disk, for the cache and temporary files."""

    def prepare(scene: Scene) -> None:
        disk = scene.folder / "disk"
        disk.mkdir()
        script = f'mount -t tmpfs -o {options} none "$0" && mkdir "$0/tmp" && exec "$@"'
        scene.wrapper = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(disk)]
        scene.settings["cache_dir"] = disk / "cache"
        scene.environment["TMPDIR"] = str(disk / "tmp")

    return prepare


def read_only_cache(scene: Scene) -> None:
    """Put the cache on a file system that is read-only."""
    disk = scene.folder / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o ro,size=1M none "$0" && exec "$@"'
    scene.wrapper = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(disk)]
    scene.settings["cache_dir"] = disk / "cache"


def no_mounts() -> str:
    """Say why a test cannot mount anything here."""
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True)
    return "this machine allows no user namespace with a mount of its own" if tried.returncode else ""


def own_disk(scene: Scene) -> Path:
    """The instance's file system as seen from outside."""
    return own_disk_of(scene.instance.process.pid, scene.folder)


def own_disk_of(pid: int, folder: Path) -> Path:
    """FOLDER/disk as a process sees it."""
    return Path(f"/proc/{pid}/root{folder}/disk")


def fill_disk(scene: Scene) -> None:
    """Leave no byte free, then crash."""
    with contextlib.suppress(OSError), (own_disk(scene) / "filler").open("wb") as file:
        while True:
            file.write(b"x" * 2**16)
            file.flush()
    scene.tell(crash_now=1)


def remove_folder_on_disk(scene: Scene) -> None:
    """Remove the instance's folder for temporary files if it has a file system of its own."""
    for path in (own_disk(scene) / "tmp").glob("pascaline-serve-*"):
        shutil.rmtree(path)


def empty_disk(scene: Scene) -> None:
    """Make room again."""
    (own_disk(scene) / "filler").unlink()


def limit(kind: int, value: int) -> Inject:
    """Lower a limit of the supervisor's."""

    def inject(scene: Scene) -> None:
        pid = scene.instance.process.pid
        scene.notes["limit"] = (kind, resource.prlimit(pid, kind))
        resource.prlimit(pid, kind, (value, scene.notes["limit"][1][1]))

    return inject


def unlimit(scene: Scene) -> None:
    """Take the limit back."""
    kind, before = scene.notes["limit"]
    resource.prlimit(scene.instance.process.pid, kind, before)


def steal_port(scene: Scene) -> None:
    """Crash the engine, and listen on its port before the next one does."""
    port = scene.port
    scene.tell(crash_now=1)
    thief = wait_until("the port is free", lambda: listener(port), every=0.01)
    scene.notes["thief"] = thief
    scene.after.callback(thief.close)


def listener(port: int) -> socket.socket | None:
    """Listen on a port, or return None while another program does."""
    with contextlib.suppress(OSError):
        return socket.create_server(("127.0.0.1", port))
    return None


def give_port_back(scene: Scene) -> None:
    """Listen no more."""
    scene.notes["thief"].close()


def take_ports(*names: str) -> Inject:
    """Listen on ports before the instance starts."""

    def prepare(scene: Scene) -> None:
        for name in names:
            taken = socket.create_server(("127.0.0.1", 0))
            scene.notes["thief"] = taken
            scene.after.callback(taken.close)
            scene.settings[name] = taken.getsockname()[1]

    return prepare


def remove_runtime_folder(scene: Scene) -> None:
    """As a cleaner of temporary files does, then crash."""
    for path in Path(scene.environment["TMPDIR"]).glob("pascaline-serve-*"):
        shutil.rmtree(path)
    scene.tell(crash_now=1)


def own_tmp(scene: Scene) -> None:
    """Give the instance its own folder for temporary files."""
    (scene.folder / "tmp").mkdir()
    scene.environment["TMPDIR"] = str(scene.folder / "tmp")


def replace_runtime_folder(scene: Scene) -> None:
    """Put a link to a folder of somebody else's where the instance's own was, then crash."""
    trap = scene.folder / "trap"
    trap.mkdir()
    for path in Path(scene.environment["TMPDIR"]).glob("pascaline-serve-*"):
        shutil.rmtree(path)
        path.symlink_to(trap)
    scene.tell(crash_now=1)


def state_folder_gone(scene: Scene) -> None:
    """Name a folder for the state that does not exist."""
    scene.environment["STATE_DIRECTORY"] = str(scene.folder / "gone")


SITE = """
import os, socket, time
_now, _resolve = time.time, socket.getaddrinfo

def shifted():
    try:
        with open({clock!r}) as file:
            return _now() + float(file.read() or 0)
    except OSError:
        return _now()

def resolve(host, *arguments, **options):
    if os.path.exists({dns!r}) and host and not host.replace(".", "").replace(":", "").isdigit():
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return _resolve(host, *arguments, **options)

time.time, socket.getaddrinfo = shifted, resolve
"""


def own_clock(scene: Scene) -> None:
    """Let a test set the clock and the resolver of all Python processes of the instance."""
    site = scene.folder / "site"
    site.mkdir()
    paths = {"clock": str(scene.folder / "clock"), "dns": str(scene.folder / "no-dns")}
    (site / "sitecustomize.py").write_text(SITE.format(**paths))
    scene.environment["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"


def set_clock(seconds: float) -> Inject:
    """Let the wall clock jump."""
    return lambda scene: (scene.folder / "clock").write_text(str(seconds)) and None


def no_names(scene: Scene) -> None:
    """Let no name be resolved any more."""
    (scene.folder / "no-dns").touch()


def unread(scene: Scene) -> None:
    """Let nobody read the log, and write a lot to it."""
    scene.after.enter_context(scene.instance.unread())
    scene.tell(flood_lines_per_second=5_000)


# --- the model --------------------------------------------------------------------------------------------------------


def overwrite_model(scene: Scene) -> None:
    """Change weights, and neither size nor header."""
    with scene.model.open("r+b") as file:
        file.seek(scene.model.stat().st_size - 64)
        file.write(b"\x11" * 64)


def truncate_model(scene: Scene) -> None:
    """Cut the file in half."""
    os.truncate(scene.model, scene.model.stat().st_size // 2)


def remove_model(scene: Scene) -> None:
    """Delete the file, and keep it for `bring_model_back`."""
    scene.model.rename(scene.folder / "aside")


def bring_model_back(scene: Scene) -> None:
    """Put the file back."""
    (scene.folder / "aside").rename(scene.model)


def prepared_folder(scene: Scene) -> Path:
    """The folder that the engine reads instead of the model's file."""
    return next((Path(scene.instance.settings["cache_dir"]) / "prepared").glob("*/pascal.json")).parent


def damage_prepared(how: Callable[[Path], None]) -> Inject:
    """Damage the converted copy, then crash."""

    def inject(scene: Scene) -> None:
        how(prepared_folder(scene))
        scene.tell(crash_now=1)

    return inject


# --- clients ----------------------------------------------------------------------------------------------------------


def connections(count: int, text: bytes = b"", *, port: str = "agent_port", shut: bool = False) -> Inject:
    """Open connections and keep them; each sends a text, and half-closes its side if `shut`."""

    def inject(scene: Scene) -> None:
        for _ in range(count):
            connection = socket.socket()
            scene.after.callback(connection.close)
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.connect_ex(("127.0.0.1", scene.instance.settings[port]))
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):
                if text:
                    connection.sendall(text)
                if shut:
                    connection.shutdown(socket.SHUT_WR)

    return inject


def drip(seconds: float, count: int = 20) -> Inject:
    """Send requests to the agent one byte at a time, on several connections."""

    def inject(scene: Scene) -> None:
        open_ones = [socket.create_connection(("127.0.0.1", scene.agent_port)) for _ in range(count)]
        for each in open_ones:
            scene.after.callback(each.close)
        end = time.monotonic() + seconds
        text = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000
        for position in range(len(text)):
            for each in open_ones:
                with contextlib.suppress(OSError):
                    each.sendall(text[position : position + 1])
            time.sleep(0.1)
            if time.monotonic() > end:
                return

    return inject


def garbage(count: int) -> Inject:
    """Send malformed requests to the agent."""
    return lambda scene: send_noise(scene.agent_port, count)


def foreign_drain(scene: Scene) -> None:
    """Ask for a drain as a web page of another origin does."""
    answered = scene.instance.agent("/drain", {}, headers={"Origin": "http://evil.example"})
    assert answered.status == 403, answered


def burst(count: int, tokens: int = 4) -> Inject:
    """Send many requests at once, beside the load; each must be answered or refused."""

    def inject(scene: Scene) -> None:
        from faults.scene import KEY
        from support.ledger import Outcome, ask

        found: list[Any] = []
        key = KEY if scene.fault.key else None

        def one() -> None:
            found.append(ask(scene.port, stream=False, tokens=tokens, key=key))

        threads = [threading.Thread(target=one) for _ in range(count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert all(each.outcome in {Outcome.WHOLE, Outcome.REFUSED} for each in found), found

    return inject


def long_prompt(words: int) -> Inject:
    """Send a prompt that takes a while, and wait for its answer."""

    def inject(scene: Scene) -> None:
        assert scene.instance.complete("w " * words, 2).status == 200

    return inject


# --- the GPU ----------------------------------------------------------------------------------------------------------


def one_p4(scene: Scene) -> None:
    """Run the instance on a GPU of the fake NVML, with a kernel log of its own."""
    host, tools = scene.folder / "host.nvml", scene.folder / "bin"
    write_scenario(host, ONE_P4)
    tools.mkdir()
    log = scene.folder / "kernel.log"
    log.touch()
    (tools / "journalctl").write_text(f'#!/bin/sh\nexec cat "{log}"\n')
    (tools / "journalctl").chmod(0o755)
    scene.environment |= fake_nvml_environment(host, base={}) | {
        "CUDA_VISIBLE_DEVICES": "0",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    scene.settings["device"] = "cuda"


def nvml(text: str) -> Inject:
    """Change what NVML answers."""
    return lambda scene: write_scenario(scene.folder / "host.nvml", text)


def xid(number: int, words: str = "words") -> Inject:
    """Let the driver write an Xid event about the instance's GPU to the kernel's log."""

    def inject(scene: Scene) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 1))
        line = f"{stamp} host kernel: NVRM: Xid (PCI:0000:01:00): {number}, pid='<unknown>', name=<unknown>, {words}\n"
        with (scene.folder / "kernel.log").open("a") as log:
            log.write(line)

    return inject


# --- the kernel's memory limit ----------------------------------------------------------------------------------------


def memory_group(mebibytes: int) -> Inject:
    """Run the instance in a memory control group of its own; `limit_memory` sets its limit."""

    def prepare(scene: Scene) -> None:
        group = new_memory_group()
        assert group is not None
        scene.notes |= {"group": group, "mebibytes": mebibytes}
        scene.after.callback(_remove_group, group)
        scene.wrapper = ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"]

    return prepare


def no_memory_groups() -> str:
    """Say why a test cannot make a memory control group here."""
    group = new_memory_group()
    if group is None:
        return "this machine lets a test make no memory control group"
    _remove_group(group)
    return ""


def new_memory_group() -> Path | None:
    """Return a new group below this process's own, or None where that is not allowed."""
    from pascaline.control_groups import group_folders

    for folder in group_folders("memory")[:1]:
        path = folder / f"pascaline-test-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            path.mkdir()
            if (path / "memory.max").exists() or (path / "memory.limit_in_bytes").exists():
                return path
            path.rmdir()
    return None


def _remove_group(group: Path) -> None:
    def removed() -> bool:
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    wait_until("the group is empty", removed, seconds=10)


def limit_memory(scene: Scene) -> None:
    """Set the limit, so much above what is used now."""
    group = scene.notes["group"]
    found = next(group / name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
    used = next(group / name for name in ("memory.current", "memory.usage_in_bytes") if (group / name).exists())
    found.write_text(str(int(used.read_text()) + scene.notes["mebibytes"] * 2**20))
