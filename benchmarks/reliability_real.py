"""Faults of tests/faults done to real engines: SGLang under pascaline, and bare ones that are only restarted.

    python benchmarks/reliability_real.py FILE [--only REGEX] [--missing]    measure; adds rows to FILE (JSON)

All three run at once with a tiny random model on the CPU, and each fault is done to all of them at the same moment:
same run, same machine, same load. The bare engines stand behind a loop that starts them again a second after they end,
as systemd does with Restart=on-failure. Bare SGLang has the command line that pascaline starts it with, plugin
included, which it needs to run without a GPU here; no supervisor is around it. pascaline has its default settings.

`benchmarks/reliability.py page` shows the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from faults import injectors as i
from faults.scene import Watcher
from pascaline.serving import strays
from reliability import BareScene, llama_command, temporary_folder
from support.instance import MARK, Instance, running, wait_until
from support.ledger import Load, Outcome, ask
from support.models import tiny, write_gguf
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Subject = "Supervised | Bare"

HORIZON_SECONDS: Final = 240.0
"""How long an engine that ended is waited for; a start takes half a minute, on a machine under load several."""
STALL_HORIZON_SECONDS: Final = 60.0
"""The same for one that runs and does not answer: pascaline's aim for finding that."""
START_SECONDS: Final = 400.0
HOLD_SECONDS: Final = 6.0
"""How long a fault that need not change anything is watched."""
THIEF_SECONDS: Final = 15.0
"""How long the port stays stolen: less than a client's patience."""
SOFT_DESCRIPTORS: Final = 1024
"""systemd's DefaultLimitNOFILE."""
SMALL: Final[dict[str, Any]] = {
    "device": "cpu",
    "context_length": 512,
    "max_running_requests": 4,
    "max_queued_requests": 8,
    "threads": 1,
    "served_model_name": "m",
    "start_timeout": START_SECONDS,
    "max_restarts": 1000,
}
SUPERVISED, BARE_SGLANG, BARE_LLAMA = "pascaline", "bare SGLang", "bare llama-server"
SUBJECTS: Final = (SUPERVISED, BARE_SGLANG, BARE_LLAMA)
SGLANG: Final = frozenset({SUPERVISED, BARE_SGLANG})


@dataclass(frozen=True, slots=True, kw_only=True)
class RealFault:
    """A fault, and whom it is done to."""

    name: str
    """Of the row in tests/faults/table.py, if it is there."""
    inject: i.Inject
    heal: i.Inject | None = None
    heal_after: float = 0.0
    """Seconds from the fault."""
    stays: bool = False
    """Whether it may change nothing."""
    subjects: frozenset[str] = frozenset(SUBJECTS)
    horizon: float = HORIZON_SECONDS
    last: bool = False
    """Whether it ends the instance itself: a new one is started after it."""


def signal_to(role: str, number: int) -> i.Inject:
    """Send a signal to a process of the engine: engine, scheduler or detokenizer."""
    return lambda scene: getattr(scene, role)().send_signal(number)


def pause_all(seconds: float) -> i.Inject:
    """Stop the engine's processes, and those that watch it, as a hypervisor does."""

    def inject(scene: Any) -> None:
        processes = scene.all_processes()
        for process in processes:
            process.suspend()
        time.sleep(seconds)
        for process in processes:
            process.resume()

    return inject


def limit(kind: int, value: int) -> i.Inject:
    """Lower a limit of pascaline's, or of the bare engine's, which has nobody beside it."""

    def inject(scene: Any) -> None:
        pid, before = scene.main_pid, resource.prlimit(scene.main_pid, kind)

        def take_back() -> None:
            with contextlib.suppress(ProcessLookupError):  # the limit may have ended it
                resource.prlimit(pid, kind, before)

        scene.after.callback(take_back)
        resource.prlimit(pid, kind, (value, before[1]))

    return inject


def long_prompt(scene: Any) -> None:
    """Send a prompt that fills most of the context."""
    found = ask(scene.port, stream=False, tokens=2, prompt="w " * 100)
    assert found.outcome is Outcome.WHOLE, found


def kill(scene: Any) -> None:
    """Let the engine crash."""
    scene.tell(crash_now=1)


def fill_disk(scene: Any) -> None:
    """Leave no byte free until the row is over, and crash."""
    scene.after.callback(i.empty_disk, scene)
    i.fill_disk(scene)


def names_back(scene: Any) -> None:
    """Let names be resolved again."""
    (scene.folder / "no-dns").unlink()


def empty_temporary_folder(scene: Any) -> None:
    """Remove what a cleaner of temporary files removes."""
    for path in (i.own_disk(scene) / "tmp").iterdir():
        shutil.rmtree(path, ignore_errors=True)


HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CUT = HALF + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"


def ends(name: str, inject: i.Inject, **options: Any) -> RealFault:
    """The engine ends, or its answers do."""
    return RealFault(name=name, inject=inject, **options)


def stalls(name: str, inject: i.Inject, **options: Any) -> RealFault:
    """No answers leave any more."""
    return RealFault(name=name, inject=inject, horizon=STALL_HORIZON_SECONDS, **options)


def stays(name: str, inject: i.Inject, **options: Any) -> RealFault:
    """Nothing need change."""
    return RealFault(name=name, inject=inject, stays=True, **options)


# The most informative ones come first: a run may be cut.
FAULTS: Final = (
    stalls("detokenizer stops: answers are lost", signal_to("detokenizer", signal.SIGSTOP), subjects=SGLANG),
    stays("a full queue", i.burst(24, 50)),
    stays("engine: 300 half requests", i.connections(300, HALF, port="port")),
    stays("engine: 300 requests cut in their body", i.connections(300, CUT, port="port", shut=True)),
    stays("engine: 300 half-closed connections", i.connections(300, HALF, port="port", shut=True)),
    stays("engine: 5,000 idle connections", i.connections(5_000, port="port")),
    stays("engine: 2,000 requests of noise", lambda scene: i.send_noise(scene.port, 2_000)),
    stays("64 requests at once", i.burst(64)),
    ends("engine: SIGKILL", signal_to("engine", signal.SIGKILL)),
    stalls("scheduler: SIGSTOP", signal_to("scheduler", signal.SIGSTOP), subjects=SGLANG),
    ends("scheduler: SIGKILL", signal_to("scheduler", signal.SIGKILL), subjects=SGLANG),
    stalls("engine: SIGSTOP", signal_to("engine", signal.SIGSTOP)),
    ends("engine's port stolen", i.steal_port, heal=i.give_port_back, heal_after=THIEF_SECONDS),
    ends("disk full, then a crash", fill_disk),
    ends("detokenizer: SIGKILL", signal_to("detokenizer", signal.SIGKILL), subjects=SGLANG),
    stays("a long prefill", long_prompt),
    stays("agent: 10,000 idle connections", i.connections(10_000), subjects=frozenset({SUPERVISED})),
    stays("agent: 1,100 half requests", i.connections(1_100, b"GET /health HTTP/1.1\r\nHost: x\r\n"),
          subjects=frozenset({SUPERVISED})),
    stays("agent: 300 half-closed connections", i.connections(300, b"GET /health HTTP/1.1\r\n", shut=True),
          subjects=frozenset({SUPERVISED})),
    stays("agent: slow-loris", i.drip(6), subjects=frozenset({SUPERVISED})),
    stays("agent: 2,000 requests of noise", i.garbage(2_000), subjects=frozenset({SUPERVISED})),
    stays("agent: drain from a foreign web page", i.foreign_drain, subjects=frozenset({SUPERVISED})),
    stays("runtime folder removed", empty_temporary_folder),
    stays("engine paused for 1.5 s", i.pause(1.5, "engine", "worker")),
    stays("supervisor paused for 5 s", i.pause(5, "supervisor"), subjects=frozenset({SUPERVISED})),
    stays("host paused for 6 s", pause_all(6.0)),
    stays("clock jumps a year forward", i.set_clock(3.2e7), heal=i.set_clock(0), heal_after=HOLD_SECONDS,
          subjects=SGLANG),
    stays("clock jumps ten years back", i.set_clock(-3.2e8), heal=i.set_clock(0), heal_after=HOLD_SECONDS,
          subjects=SGLANG),
    stays("files limited to zero bytes", limit(resource.RLIMIT_FSIZE, 0)),
    stays("descriptors used up", limit(resource.RLIMIT_NOFILE, 12)),
    stays("DNS gone", i.no_names, heal=names_back, heal_after=HOLD_SECONDS, subjects=SGLANG),
    ends("engine: SIGTERM by somebody else", signal_to("engine", signal.SIGTERM)),
    ends("engine: SIGSEGV", signal_to("engine", signal.SIGSEGV)),
    ends("engine: SIGABRT", signal_to("engine", signal.SIGABRT)),
    ends("engine: a real-time signal without a name", signal_to("engine", signal.SIGRTMIN + 1)),
    ends("converted copy: a file truncated",
         i.both(lambda scene: os.truncate(i.prepared_folder(scene) / "config.json", 0), kill), subjects=SGLANG),
    ends("converted copy: a file is gone",
         i.both(lambda scene: (i.prepared_folder(scene) / "config.json").unlink(), kill), subjects=SGLANG),
    ends("runtime folder removed, then a crash", i.both(empty_temporary_folder, kill)),
    ends("supervisor: SIGTERM under load", i.signal_supervisor("SIGTERM"), subjects=frozenset({SUPERVISED}), last=True),
    ends("POST /drain under load", lambda scene: scene.instance.agent("/drain", {}) and None,
         subjects=frozenset({SUPERVISED}), last=True),
    ends("supervisor: SIGKILL", i.signal_supervisor("SIGKILL"), subjects=frozenset({SUPERVISED}), last=True),
)  # fmt: skip


def own_disk(scene: Any) -> list[str]:
    """Make FOLDER/disk for temporary files, and return a command that runs another with a file system there."""
    disk = scene.folder / "disk"
    disk.mkdir()
    scene.environment["TMPDIR"] = str(disk / "tmp")
    script = f'mount -t tmpfs -o size=256M none "$0" && mkdir "$0/tmp" && ulimit -Sn {SOFT_DESCRIPTORS} && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(disk)]


class Supervised:
    """SGLang under pascaline."""

    horizon = HORIZON_SECONDS
    """It starts an engine that stalls again, which takes as long as after an end."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.fault = SimpleNamespace(key=False)
        self.notes: dict[str, Any] = {}
        self.after = contextlib.ExitStack()
        self.environment: dict[str, str] = {}
        self._wrapper = own_disk(self)
        i.own_clock(self)  # type: ignore[arg-type]
        self._ports = {"port": free_port(), "agent_port": free_port(), "cache_dir": folder / "cache"}
        self._stack = contextlib.ExitStack()
        self.instance: Instance
        self._restarts_before = 0.0

    def start(self) -> None:
        """Start an instance with the ports and files of the one before."""
        self.begin()
        self.instance.wait_for_state("ready", "busy", seconds=START_SECONDS)

    def begin(self) -> None:
        """Start it without waiting."""
        self._stack.close()
        settings = SMALL | self._ports | {"model": self.model}
        started = running(self.folder, environment=self.environment, wrapper=self._wrapper, **settings)
        self.instance = self._stack.enter_context(started)

    def close(self) -> None:
        """End it."""
        self._stack.close()

    @property
    def port(self) -> int:
        """Of the engine's API."""
        return int(self._ports["port"])

    @property
    def agent_port(self) -> int:
        """Of the agent."""
        return int(self._ports["agent_port"])

    @property
    def main_pid(self) -> int:
        """The supervisor."""
        return self.instance.process.pid

    def engine(self) -> psutil.Process:
        """SGLang's first process."""
        return psutil.Process(self.instance.health()["engine_pid"])

    def runs_sglang(self) -> bool:
        """Whether the engine's process has become SGLang."""
        return bool(self.instance.health().get("engine_pid")) and self.engine().cmdline()[1:2] == ["-m"]

    def scheduler(self) -> psutil.Process:
        """The process that runs the model."""
        return _titled(self.engine(), "sched")

    worker = scheduler

    def detokenizer(self) -> psutil.Process:
        """The process that makes text of tokens."""
        return _titled(self.engine(), "detok")

    def all_processes(self) -> list[psutil.Process]:
        """The supervisor and everything below it."""
        return [psutil.Process(self.main_pid), *self.instance.descendants()]

    def tell(self, **_: Any) -> None:
        """Make a real engine crash, as the stand-in does on request."""
        self.engine().kill()

    def signal(self, name: str) -> None:
        """Send a signal to the supervisor."""
        self.instance.process.send_signal(signal.Signals[name])

    def log_tail(self) -> str:
        """Return its last lines."""
        return "\n".join(self.instance.lines[-20:])

    def restarts(self, _: float) -> list[float]:
        """Return nothing: the agent's readiness shows a restart."""
        return []

    def repair(self) -> None:
        """Start again."""
        self.start()

    def settle(self) -> None:
        """Wait until it serves; start it if the last fault ended it."""
        if self.instance.process.poll() is not None:
            self.instance.wait()
            self.start()
        self.instance.wait_for_state("ready", "busy", seconds=START_SECONDS)


class Bare(BareScene):
    """An engine behind a restart loop, with a file system and a clock of its own."""

    horizon = 0.0

    def __init__(self, folder: Path, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        """command, environment: of the engine."""
        super().__init__(folder, SimpleNamespace(key=False, faults=""), [], port)  # type: ignore[arg-type]
        self.environment = dict(environment)
        wrapper = own_disk(self)
        i.own_clock(self)  # type: ignore[arg-type]
        # The file system outlives an end of the engine.
        self._holder = subprocess.Popen([*wrapper, "sleep", "infinity"])
        wait_until("the file system", (i.own_disk_of(self._holder.pid, folder) / "tmp").is_dir)
        enter = ["nsenter", f"--target={self._holder.pid}", "--user", "--mount", "--preserve-credentials"]
        limited = ["sh", "-c", f'ulimit -Sn {SOFT_DESCRIPTORS} && exec "$@"', "sh"]
        self._command = [*enter, *limited, *command]
        self.instance = SimpleNamespace(
            settings={"port": port, "agent_port": port, "cache_dir": folder}, process=self._holder
        )
        self.agent_port = port

    def start(self) -> None:
        """Start the loop, and wait until the engine answers."""
        self.__enter__()

    def close(self) -> None:
        """End it for good."""
        self.__exit__()
        self._holder.kill()
        self._holder.wait()

    @property
    def main_pid(self) -> int:
        """The engine."""
        return self.engine().pid

    def scheduler(self) -> psutil.Process:
        """The process that runs the model; llama-server has one process."""
        return _titled(self.engine(), "sched") if self.engine().children() else self.engine()

    worker = scheduler

    def detokenizer(self) -> psutil.Process:
        """The process that makes text of tokens."""
        return _titled(self.engine(), "detok")

    def all_processes(self) -> list[psutil.Process]:
        """The engine and its children."""
        return [self.engine(), *self.engine().children(recursive=True)]

    def tell(self, **_: Any) -> None:
        """Crash."""
        self.engine().kill()

    def log_tail(self) -> str:
        """Return its last lines."""
        return (self.folder / "engine.log").read_text(errors="replace")[-3000:]

    def restarts(self, since: float) -> list[float]:
        """Return the times at which the loop saw an end."""
        return [when for when in self.ends if when >= since]

    def repair(self) -> None:
        """What a person would do: whole files, and a new process; one that was stopped goes on."""
        if (aside := self.folder / "prepared-whole").exists():
            shutil.rmtree(self.folder / "prepared")
            shutil.copytree(aside, self.folder / "prepared")
        stopped = [each for each in self.all_processes() if each.status() == psutil.STATUS_STOPPED]
        for process in stopped:
            process.resume()
        if not stopped:
            self.kill_group()
        self.settle()

    def settle(self) -> None:
        """Wait until it serves."""
        wait_until("an answer of the bare engine", self._answers, seconds=START_SECONDS, every=0.5)


def _titled(engine: psutil.Process, title: str) -> psutil.Process:
    """Return SGLang's process of this role; the kernel cuts a title to 15 characters."""
    found = (each for each in engine.children(recursive=True) if each.name().startswith(f"sglang::{title}"))
    process: psutil.Process = wait_until(title, lambda: next(found, None), seconds=START_SECONDS)
    return process


def bare_sglang(folder: Path, supervised: Supervised) -> Bare:
    """Return SGLang with the command line and the variables that pascaline gave it, and files of its own."""
    engine = supervised.engine()
    command, environment = engine.cmdline(), engine.environ()
    for mark in (MARK, strays.VARIABLE):
        del environment[mark]
    port = free_port()
    copy = folder / "prepared" / "model"
    shutil.copytree(i.prepared_folder(supervised), copy)  # type: ignore[arg-type]
    shutil.copytree(folder / "prepared", folder / "prepared-whole")
    command[command.index("--model-path") + 1] = str(copy)
    command[command.index("--port") + 1] = str(port)
    return Bare(folder, command, port, environment)


def measure(scene: Any, fault: RealFault) -> dict[str, Any]:
    """Do one fault to one subject."""
    scene.settle()
    scene.after = contextlib.ExitStack()
    watcher = Watcher(scene.agent_port) if isinstance(scene, Supervised) else None
    with watcher or contextlib.nullcontext(), Load(scene.port) as load:
        wait_until("a load", lambda: load.ledger.count(Outcome.WHOLE) >= 2, seconds=START_SECONDS)
        began = time.monotonic()
        with scene.after:
            problem = _inject(scene, fault)
            _heal(scene, fault, began)
            if fault.last:
                scene.instance.wait(START_SECONDS)
                scene.start()
            recovered = _recovery(load, began, max(fault.horizon, scene.horizon))
            if fault.stays:
                time.sleep(max(0.0, began + HOLD_SECONDS - time.monotonic()))
    first = watcher.first(began, False, None) if watcher else None
    ended = scene.restarts(began)
    if recovered is None:
        print(scene.log_tail(), flush=True)
        scene.repair()
    return {
        "unhealthy": None if first is None else first - began,
        "ended": ended[0] - began if ended else None,
        "recovered": recovered,
        "problem": problem,
        "horizon": max(fault.horizon, scene.horizon),
        **{str(outcome): load.ledger.count(outcome) for outcome in Outcome},
    }


def _inject(scene: Any, fault: RealFault) -> str:
    """Do it; return what the injector itself found wrong, such as an answer that never came."""
    try:
        fault.inject(scene)
    except (AssertionError, OSError, psutil.Error) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def _heal(scene: Any, fault: RealFault, began: float) -> None:
    if fault.heal is not None:
        time.sleep(max(0.0, began + fault.heal_after - time.monotonic()))
        fault.heal(scene)


def _recovery(load: Load, began: float, horizon: float) -> float | None:
    """Return the seconds from the fault to the first whole answer to a request that met it; None within the horizon."""
    since = time.monotonic() + 0.3
    while (entry := load.ledger.whole_since(since)) is None and time.monotonic() - since < horizon:
        time.sleep(0.1)
    return entry.ended - began if entry else None


def subjects(stack: contextlib.ExitStack, folder: Path) -> Iterator[tuple[str, Any]]:
    """Start all, and yield each with its name."""
    for name in SUBJECTS:
        (folder / name.replace(" ", "-")).mkdir()
    model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
    supervised = Supervised(folder / SUPERVISED, model)
    stack.callback(supervised.close)
    supervised.begin()
    yield SUPERVISED, supervised
    wait_until("the engine's process", supervised.runs_sglang, seconds=START_SECONDS)
    bare = bare_sglang(folder / "bare-SGLang", supervised)
    stack.callback(bare.close)
    bare.start()
    yield BARE_SGLANG, bare
    if shutil.which("llama-server"):
        port = free_port()
        llama = Bare(folder / "bare-llama-server", llama_command(port, model), port, os.environ)
        stack.callback(llama.close)
        llama.start()
        yield BARE_LLAMA, llama


def run_all(path: Path, only: str, *, missing: bool) -> None:
    """Measure the chosen rows, and write each to the file."""
    document = json.loads(path.read_text())
    real = document.setdefault("real", {"rows": {}})
    with temporary_folder() as folder, contextlib.ExitStack() as stack:
        ready = dict(subjects(stack, folder))
        for fault in FAULTS:
            if not re.search(only, fault.name):
                continue
            row = real["rows"].setdefault(fault.name, {})
            chosen = {name: each for name, each in ready.items() if name in fault.subjects}
            with ThreadPoolExecutor(len(SUBJECTS)) as pool:
                running = {
                    name: pool.submit(measure, each, fault)
                    for name, each in chosen.items()
                    if not (missing and name in row)
                }
            for name, future in running.items():
                row[name] = future.result() | {"load": os.getloadavg()[0]}
                print(f"{fault.name}, {name}: {json.dumps(row[name])}", flush=True)
            real |= {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
                "versions": ready[SUPERVISED].instance.health().get("versions") or real.get("versions"),
            }
            path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Otherwise the engines would outlive a script that is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default=".", help="a regular expression of names (default: all)")
    parser.add_argument("--missing", action="store_true", help="only rows that the file does not have yet")
    arguments = parser.parse_args()
    run_all(arguments.file, arguments.only, missing=arguments.missing)


if __name__ == "__main__":
    main()
