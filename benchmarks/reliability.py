"""Every fault of tests/faults against pascaline, and the same faults against bare engines that are only restarted.

    python benchmarks/reliability.py run FILE [--only REGEX] [--at-once 4]   measure; adds its rows to FILE (JSON)
    python benchmarks/reliability.py page FILE > docs/reliability.md

The bare engines run behind a loop that starts them again a second after they end, as systemd does with Restart=always:
  bare SGLang        the fake engine, which has SGLang's command line, interface, output and faults
  bare llama-server  the real one with the built-in model; left out if it is not on PATH, and where a fault is SGLang's
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from faults.scene import DEFAULT_STALL_SECONDS, IMPATIENT, STALL_SECONDS, Fault, run
from faults.table import FAULTS, SEED
from pascaline.models.resolve import builtin_model
from support.instance import FAKE_ENGINE, http, wait_until
from support.ledger import Load, Outcome
from support.models import tiny, write_gguf
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HORIZON_SECONDS = 40.0
"""How long a bare engine is waited for."""
START_SECONDS = 400.0
RESTART_SECONDS = 1.0
BARE_GROUPS = frozenset({"engine ends", "engine stalls"})
NEEDS_AN_INSTANCE = re.compile("restart|on_oom|zombies|stray|ignore SIGTERM")
LLAMA_TOO = re.compile(r"engine: SIG")
INTRO = f"""# Reliability

What goes wrong, what pascaline does about it, and how long that takes. Each row is a test (`tests/faults/table.py`),
which also holds the limits; `benchmarks/reliability.py` measured the figures and wrote this page. The engine is a
stand-in with SGLang's command line, interface, output and faults (`tests/fake_engine`), so that a fault can be repeated
at will. What can be done to real engines is done to them by `benchmarks/reliability_real.py`: see
[Real engines](#real-engines). `tests/faults/test_real_sglang.py` and `tests/serve/test_llama_cpp.py` hold the most
important ones.

Clients ask all the time, every second one for a stream. **Every request is accounted for:** answered whole, refused
(no connection, or a status from 400 on), cut (the client sees a closed connection or an error), or silent (no
answer and no end within 30 s). Requests that were in the engine when it died are cut: nobody can answer them any more.

- **detected**: from the fault to `/readyz` saying no (or the end of the instance). Measured with `stall_timeout`
  {STALL_SECONDS:g} s instead of {DEFAULT_STALL_SECONDS:g} s; **by default** adds the difference where only silence
  shows the fault.
- **recovered**: from detection, or from the moment at which the cause was taken away, to the first whole answer.
- **bare SGLang**, **bare llama-server**: the same fault, and only a loop that starts the engine again when it ends, as
  systemd does. Seconds from the fault to the first whole answer, and requests that were left without any end. A figure
  of SGLang with † is the stand-in's; without, SGLang's own, whose start takes far longer.
- A dash: there is nothing to detect or to recover from, or the fault cannot be done to that engine.
"""


class BareScene:
    """An engine behind a restart loop, as injectors see it."""

    def __init__(self, folder: Path, fault: Fault, command: Sequence[str], port: int) -> None:
        """command: of the engine."""
        self.folder, self.fault, self.port = folder, fault, port
        self.notes: dict[str, Any] = {}
        self.after = contextlib.ExitStack()
        self.environment = os.environ | {"FAKE_ENGINE_FAULTS": f"decode_tokens_per_second=100 {fault.faults}"}
        self.instance = SimpleNamespace(settings={"port": port})
        self.ends: list[float] = []
        """Times of the monotonic clock at which the engine was found ended."""
        self._command = command
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._go_on)

    def __enter__(self) -> BareScene:
        """Start it, and wait until it answers."""
        self._thread.start()
        wait_until("an answer of the bare engine", self._answers, seconds=START_SECONDS, every=0.2)
        return self

    def __exit__(self, *_: object) -> None:
        """End it for good."""
        self._over.set()
        self.kill_group()
        self._thread.join()
        self.after.close()

    def kill_group(self) -> None:
        """Kill the engine and its processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _go_on(self) -> None:
        while not self._over.is_set():
            with (self.folder / "engine.log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, stdout=log, stderr=log, env=self.environment, start_new_session=True
                )
            self._process.wait()
            self.ends.append(time.monotonic())
            # What systemd's KillMode does with the rest of the unit.
            self.kill_group()
            self._over.wait(RESTART_SECONDS)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            body = {"model": "m", "prompt": "a", "max_tokens": 1}
            return http(f"http://127.0.0.1:{self.port}/v1/completions", body, timeout=60).status == 200
        return False

    def engine(self) -> psutil.Process:
        """Its first process."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def worker(self) -> psutil.Process:
        """The process that plays the scheduler."""
        return next(each for each in self.engine().children() if "--worker" in each.cmdline())

    def tell(self, **values: Any) -> None:
        """Change what the fake engine does."""
        with contextlib.suppress(OSError):
            http(f"http://127.0.0.1:{self.port}/fake/faults", values)


def bare(fault: Fault, command: Sequence[str], port: int, folder: Path) -> dict[str, Any]:
    """Measure one fault of a bare engine."""
    with BareScene(folder, fault, command, port) as scene, Load(port, clients=fault.clients) as load:
        wait_until("a load", lambda: len(load.ledger.entries) >= fault.clients)
        began = time.monotonic()
        fault.inject(scene)  # type: ignore[arg-type]
        # What is sent from now on meets the fault.
        since = time.monotonic() + 0.3
        while load.ledger.whole_since(since) is None and time.monotonic() - began < HORIZON_SECONDS:
            time.sleep(0.1)
        entry = load.ledger.whole_since(since)
        recovered = entry.ended - began if entry else None
    return {"recovered": recovered, "silent": load.ledger.count(Outcome.SILENT)}


def sglang_command(port: int) -> list[str]:
    """Return the fake engine's command."""
    return [sys.executable, str(FAKE_ENGINE), "-m", "sglang.launch_server", "--model-path", "m", "--port", str(port)]


def llama_command(port: int, model: Path) -> list[str]:
    """Return llama-server's command."""
    small = ["--ctx-size", "1024", "--parallel", "2", "-t", "1"]
    return ["llama-server", "--model", str(model), "--port", str(port), *small]


def can_be_bare(fault: Fault) -> bool:
    """Whether a fault can be done to an engine without an instance around it."""
    return fault.group in BARE_GROUPS and fault.prepare is None and not NEEDS_AN_INSTANCE.search(fault.name)


def measure(fault: Fault, folder: Path, model: Path) -> dict[str, Any]:
    """Run one row, and the same fault against the bare engines."""
    record = run(fault, folder, model)
    found: dict[str, Any] = {
        "group": fault.group,
        "outcome": fault.outcome,
        "states": " ".join(state for state in record.states if state != "busy"),
        "detected": record.detected,
        "by_default": record.detected_by_default,
        "recovered": record.recovered,
        "agent_p99": record.agent_p99,
        "problems": record.problems,
        **{str(outcome): record.ledger.count(outcome) for outcome in Outcome},
    }
    if can_be_bare(fault):
        with contextlib.suppress(AssertionError, OSError):
            port = free_port()
            found["bare SGLang"] = bare(fault, sglang_command(port), port, folder)
    if can_be_bare(fault) and LLAMA_TOO.match(fault.name) and shutil.which("llama-server"):
        with contextlib.suppress(AssertionError, OSError):
            port = free_port()
            found["bare llama-server"] = bare(fault, llama_command(port, builtin_model()), port, folder)
    return found


def run_all(arguments: argparse.Namespace) -> None:
    """Measure the chosen rows and add them to the file."""
    path: Path = arguments.file
    document = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    chosen = [fault for fault in FAULTS if re.search(arguments.only, f"{fault.name} [{fault.group}]")]
    with temporary_folder() as folder, ThreadPoolExecutor(arguments.at_once) as pool:
        model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
        running = {}
        for number, fault in enumerate(chosen):
            if fault.needs is None or not fault.needs():
                (folder / str(number)).mkdir()
                running[pool.submit(measure, fault, folder / str(number), model)] = fault
        for future in as_completed(running):
            fault, row = running[future], future.result()
            print(f"{fault.name}: {'; '.join(row['problems'])[:500] or 'as the table says'}", flush=True)
            if not row["problems"]:
                document["rows"][fault.name] = row | {"load": os.getloadavg()[0]}
            document["date"] = datetime.now(UTC).date().isoformat()
            document["machine"] = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
            path.write_text(json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed at the end, whatever is still written to it."""
    folder = Path(tempfile.mkdtemp(prefix="pascaline-faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def page(document: dict[str, Any]) -> str:
    """Return docs/reliability.md."""
    rows, names = document["rows"], [fault.name for fault in FAULTS]
    real = document.get("real", {"rows": {}})
    lines = [INTRO, _summary(rows)]
    for group in dict.fromkeys(fault.group for fault in FAULTS):
        inside = [name for name in names if name in rows and rows[name]["group"] == group]
        if inside:
            lines += [f"## {group.capitalize()}\n", *_table(rows, inside, real["rows"]), ""]
    if real["rows"]:
        lines += [*_real_engines(real), ""]
    absent = [name for name in names if name not in rows]
    loads = sorted(row["load"] for row in rows.values())
    lines.append(
        f"{document['date']}, {document['machine']}; load average between {loads[0]:.0f} and {loads[-1]:.0f}: "
        "the times are shorter on an idle machine."
    )
    lines.append(f"The random pairs come from seed {SEED} (`tests/faults/table.py`).")
    if absent:
        lines.append(f"\nNot measured in this run: {'; '.join(absent)}.")
    return "\n".join(lines)


def _summary(rows: dict[str, Any]) -> str:
    stopped = [row for row in rows.values() if row["outcome"] == "recovers"]
    slowest = max(row["by_default"] for row in stopped)
    kept = sum(row["outcome"] == "stays" for row in rows.values())
    silent = sum(row["silent"] for row in rows.values())
    total = sum(row[outcome] for row in rows.values() for outcome in Outcome)
    never = [row["bare SGLang"] for row in stopped if "bare SGLang" in row and row["bare SGLang"]["recovered"] is None]
    compared = sum("bare SGLang" in row for row in stopped)
    llama = [row["bare llama-server"] for row in stopped if "bare llama-server" in row]
    hung = sum(each["recovered"] is None for each in llama)
    again = f"{compared - len(never)} of {compared}"
    return (
        f"{len(rows)} faults, {total:,} requests, {silent} of them silent. Every fault that stops answers was\n"
        f"detected, with default settings within {slowest:.0f} s, and the instance served again. {kept} of the\n"
        "faults and odd situations may change nothing, and changed nothing. The bare stand-in served again\n"
        f"within {HORIZON_SECONDS:.0f} s after {again} faults, bare llama-server after {len(llama) - hung} of "
        f"{len(llama)}.\n"
    )


def _table(rows: dict[str, Any], names: Sequence[str], real: dict[str, Any]) -> Iterator[str]:
    compared = [kind for kind in ("bare SGLang", "bare llama-server") if any(kind in rows[name] for name in names)]
    head = ["fault", "states", "detected, s", "by default, s", "recovered, s", *Outcome, "agent's p99, ms", *compared]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for name in names:
        row = rows[name]
        states = row["states"].removeprefix("starting ready").strip() or "-"
        cells = [name, states, *(_seconds(row[key]) for key in ("detected", "by_default", "recovered"))]
        cells += [str(row[outcome]) for outcome in Outcome]
        cells += ["-" if row["agent_p99"] is None else f"{row['agent_p99'] * 1000:.0f}"]
        yield "| " + " | ".join([*cells, *(_bare(row, real.get(name, {}), kind) for kind in compared)]) + " |"


def _bare(row: dict[str, Any], real: dict[str, Any], kind: str) -> str:
    """Return the figure of a bare engine: the real one's if it was measured."""
    found = real.get(kind) or row.get(kind)
    if found is None:
        return "-"
    mark = "†" if kind == "bare SGLang" and kind not in real else ""
    return _again(found) + mark


def _again(found: dict[str, Any]) -> str:
    horizon = found.get("horizon", HORIZON_SECONDS)
    again = f"not within {horizon:.0f} s" if found["recovered"] is None else f"{found['recovered']:.1f} s"
    return f"{again}, {found['silent']} silent" if found["silent"] else again


REAL_INTRO = """## Real engines

The same faults, done at the same moment to SGLang under pascaline, to bare SGLang and to bare llama-server, each on the
CPU with a tiny random model and two clients. Under pascaline with default settings. The bare engines stand behind a
loop that starts them again a second after they end; bare SGLang has the command line that pascaline gives it. All
faults are done to one instance, whose wait before a restart doubles with each one in a row, up to a minute.

- **not ready**: from the fault to `/readyz` saying no, or not answering; it need not where nothing need change.
- **answers again**: from the beginning of the fault, which may take some seconds itself, to the first whole answer to a
  request that was sent after it.
- **ended**: from the fault to the loop seeing the end of the engine; never: it runs on, and the loop does nothing.
"""
SUBJECTS = ("pascaline", "bare SGLang", "bare llama-server")


def _real_engines(real: dict[str, Any]) -> Iterator[str]:
    yield REAL_INTRO
    yield _real_summary(real["rows"])
    head = ["fault", "pascaline: not ready", "answers again", "whole, refused, cut, silent"]
    for name in SUBJECTS[1:]:
        head += [f"{name}: ended", "answers again"]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for name, row in real["rows"].items():
        yield "| " + " | ".join([name, *_supervised_cells(row), *_bare_cells(row)]) + " |"
    loads = sorted(found["load"] for row in real["rows"].values() for found in row.values())
    versions = ", ".join(f"{name} {version}" for name, version in sorted((real["versions"] or {}).items()))
    yield ""
    yield (
        f"{real['date']}, {real['machine']}, {versions}; load average between {loads[0]:.0f} and {loads[-1]:.0f}. A "
        "start of SGLang, which\nmost of a recovery is, takes half a minute on an idle machine."
    )


def _real_summary(rows: dict[str, Any]) -> str:
    both = [row for row in rows.values() if "pascaline" in row and "bare SGLang" in row]
    never = [row for row in both if row["bare SGLang"]["recovered"] is None]
    unseen = [row for row in never if row["bare SGLang"]["ended"] is None]
    again = sum(row["pascaline"]["recovered"] is not None for row in rows.values() if "pascaline" in row)
    supervised = sum("pascaline" in row for row in rows.values())
    return (
        f"SGLang under pascaline answered again after {again} of {supervised} faults. Of the {len(both)} that were "
        f"done to both,\nbare SGLang did not answer again after {len(never)}; {len(unseen)} of these nobody would "
        "have noticed: its processes ran on.\n"
    )


def _supervised_cells(row: dict[str, Any]) -> list[str]:
    if (found := row.get("pascaline")) is None:
        return ["-"] * 3
    counts = ", ".join(str(found[outcome]) for outcome in Outcome)
    return [_real_seconds(found["unhealthy"]), _real_seconds(found["recovered"]), counts]


def _bare_cells(row: dict[str, Any]) -> Iterator[str]:
    for name in SUBJECTS[1:]:
        if (found := row.get(name)) is None:
            yield from ["-"] * 2
        else:
            yield _real_seconds(found["ended"])
            yield _again(found)


def _real_seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> None:
    """Measure, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    running = commands.add_parser("run", help="measure")
    running.add_argument("file", type=Path)
    running.add_argument("--only", default=".", help="a regular expression of names and groups (default: all)")
    running.add_argument("--at-once", type=int, default=4, help="rows at the same time (default: 4)")
    commands.add_parser("page", help="print docs/reliability.md").add_argument("file", type=Path)
    arguments = parser.parse_args()
    assert IMPATIENT["stall_timeout"] == STALL_SECONDS
    if arguments.command == "run":
        run_all(arguments)
    else:
        print(page(json.loads(arguments.file.read_text())), end="")


if __name__ == "__main__":
    main()
