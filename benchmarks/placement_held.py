"""Checks a plan with weights in the host's memory on a GPU of which only a small card's memory is free.

    python benchmarks/placement_held.py --server PATH --json FILE [--cases 1,2] [--layers N] [--seconds 240]
    python benchmarks/placement_held.py --page FILE [FILE ...] > docs/results/placement.md

Another process takes the card's memory but for what a Tesla P4 or P40 has. The models have their true shapes: sparse
files, whose weights are zeros except that embeddings and routers are random, so that tokens choose their own experts.
`pascaline` plans for the small card and the host's free memory, and llama-server is started with the flags that follow.
Its log is compared with the plan, then requests of the whole context are sent on all slots at once.

The context of another GPU is larger than a Pascal card's: what a server with a small model of the same kind takes
beside the buffers of its log is measured first, and what the plan has for it is replaced by that. A case is kept if
every request was answered whole and no buffer is larger than planned. Without NVML (a CPU build of llama-server)
nothing is held and nothing compared. Exit code 1 if a case is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from gguf import GGUFReader
from pascaline.cards import load_card, unknown_card
from pascaline.configuration import Configuration
from pascaline.control_groups import CGROUP, CGROUP_ROOT, group_folders
from pascaline.engines import engine_named
from pascaline.errors import MissingError, PascalineError
from pascaline.gpu import host_bandwidth
from pascaline.gpu import memory as device_memory
from pascaline.gpu.memory import host_memory, link_rate, memory_of_visible
from pascaline.gpu.reader import Reader
from pascaline.models.gguf import read_gguf
from pascaline.models.resolve import ResolvedModel
from pascaline.planning import make_plan
from pascaline.planning.hints import with_hints
from pascaline.planning.request import HostRates, request_from_settings
from pascaline.serving.task import make_task
from pascaline.settings import Settings
from support.catalog_files import shape_named, write_catalog_file
from support.instance import http
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pascaline.gpu.memory import DeviceMemory
    from pascaline.planning import Plan

MIB = 2**20
ENGINE = "llama.cpp"
ANSWER_TOKENS = 16
START_SECONDS, REQUEST_SECONDS, SAMPLE_SECONDS = 150, 150, 0.05
READ_BYTES, READERS = 2**26, 8
CASE_SECONDS = 15
"""Least time of a case: none is begun with less left."""
STARTED = time.monotonic()
HOLDER = Path(__file__).with_name("hold_gpu_memory.py")
SPEED_PROMPT, SPEED_ANSWER, SPEED_REPEATS = 2048, 24, 3
_BUFFER = re.compile(r"(\S+) +(model|KV|RS|compute|output) buffer size = +([0-9.]+) MiB")
_LOADING = "loading model tensors"


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a card under settings."""

    card: str
    model: str
    layers: int
    """Of the whole model."""
    context: int
    requests: int
    settings: dict[str, Any] = field(default_factory=dict)
    has_speed: bool = False
    """Whether speeds are measured too."""
    experts: int | None = None
    """Of a smaller file, for a trial."""


CASES = (
    Case("tesla-p4", "Qwen3-30B-A3B", 48, 8192, 2, has_speed=True),
    Case("tesla-p4", "Qwen3-14B", 40, 8192, 2, {"placement": {"layers": "auto"}, "kv_cache": {"dtype": "int8"}}),
    Case("tesla-p4", "gpt-oss-20b", 24, 8192, 4),
    Case("tesla-p4", "DeepSeek-V2-Lite", 27, 8192, 2, {"chunked_prefill_tokens": 2048}, has_speed=True),
    Case("tesla-p40", "Mixtral-8x7B", 32, 8192, 2, has_speed=True),
    Case("tesla-p40", "Qwen3.6-35B-A3B", 40, 32768, 2, {"chunked_prefill_tokens": 2048}, has_speed=True),
    Case("tesla-p40", "gpt-oss-120b", 36, 8192, 2, has_speed=True),
    Case("tesla-p40", "GLM-4.5-Air", 46, 8192, 2, has_speed=True),
)


def main() -> int:
    """Run the cases, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="llama-server", help="llama-server (default: the one on PATH)")
    parser.add_argument("--json", type=Path, help="write the results there, after each case")
    parser.add_argument("--cases", default="", help="numbers from 1 on, separated by commas (default: all)")
    parser.add_argument("--layers", type=int, help="reduce the models to this number of layers, for a trial")
    parser.add_argument("--context", type=int, help="tokens of a request instead of the case's, for a trial")
    parser.add_argument("--threads", type=int, help="CPU threads of the server (default: one on each core)")
    parser.add_argument("--settings", default="{}", help="JSON of further settings, for a trial")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no case later than this (default: 900)")
    parser.add_argument("--page", type=Path, nargs="+", metavar="FILE", help="print the page of these results instead")
    args = parser.parse_args()
    if args.page:
        print(page([json.loads(path.read_text(encoding="utf-8")) for path in args.page]))
        return 0
    numbers = [int(part) for part in args.cases.split(",") if part] or range(1, len(CASES) + 1)
    cases = [_reduced(CASES[number - 1], args) for number in numbers]
    server = shutil.which(args.server)
    if server is None:
        parser.error(f"--server: {args.server} is not a program")
    results = measure(cases, server, args.json, args.seconds)
    return 0 if results["rows"] and all(row["kept"] for row in results["rows"]) else 1


def _reduced(case: Case, args: argparse.Namespace) -> Case:
    if args.threads:
        case = replace(case, settings={"threads": args.threads, **case.settings})
    if args.context:
        case = replace(case, context=args.context)
    if not args.layers:
        return case
    layers = case.layers if case.model in WHOLE else min(case.layers, args.layers)
    return replace(case, layers=layers, experts=16, settings={**case.settings, **json.loads(args.settings)})


def say(text: str) -> None:
    """Print it with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", flush=True)


def measure(cases: Sequence[Case], server: str, output: Path | None, seconds: float) -> dict[str, Any]:
    """Return the results; they are also written after each case, so that an end in between loses one."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as workers:
        folder = Path(name)
        results: dict[str, Any] = {"machine": machine(server, folder), "rows": []}
        say(f"host measured: {results['machine']}")
        began = time.monotonic()
        files = [folder / f"{number}.gguf" for number in range(len(cases))]
        writer = workers.enter_context(ThreadPoolExecutor(1))
        written = [writer.submit(write_file, case, path) for case, path in zip(cases, files, strict=True)]
        for case, path, done in zip(cases, files, written, strict=True):
            if time.monotonic() - began > seconds - CASE_SECONDS:
                say(f"{case.model}: left out, no time")
                done.cancel()
                continue
            try:
                done.result()
                row = one(case, server, path, results["machine"])
            except RuntimeError as error:
                say(f"{case.model}: {error}")
                continue
            results["rows"].append(row)
            say(summary(row))
            if output:
                output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def machine(server: str, folder: Path) -> dict[str, Any]:
    """Return what the figures depend on."""
    try:
        gpu = gpu_memory()
        name, total = gpu.name, gpu.total_bytes
    except MissingError:
        name, total = None, 0
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"^version: (.+)$", done.stdout + done.stderr, re.MULTILINE)
    began = time.monotonic()
    command = [sys.executable, "-m", "pascaline", "plan", "--measure-host", "--json", "--cache-dir", str(folder)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "gpu": name,
        "gpu_bytes": total,
        "cpu": host_bandwidth.cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "host_bytes": host_memory().total_bytes,
        "host_bytes_per_second": [node["bytes_per_second"] for node in measured["nodes"]],
        "host_measured_seconds": round(time.monotonic() - began, 1),
        "server": version[1] if version else None,
    }


# --- The card's memory

VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


def gpu_memory() -> DeviceMemory:
    """Return the memory of the first GPU that this process sees. Raises MissingError if NVML shows none."""
    return device_memory.gpu_memory(VISIBLE)


def used_bytes(reader: Reader | None = None) -> int:
    """Return the bytes in use on the first card, 0 without NVML."""
    try:
        memory = memory_of_visible(reader.read(), VISIBLE) if reader else gpu_memory()
    except MissingError:
        return 0
    return memory.used_bytes


def own_groups() -> list[Path]:
    """Return the folders of this process's control groups."""
    return list(group_folders("memory", CGROUP, CGROUP_ROOT))


def charged_bytes(folders: Sequence[Path]) -> int:
    """Return what the first of these control groups that says so is charged for besides page cache; 0 if none does."""
    for folder in folders:
        with contextlib.suppress(OSError):
            found = dict(re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE))
            return sum(int(found.get(key, 0)) for key in ("anon", "shmem", "kernel"))
    return 0


@contextlib.contextmanager
def group_of_its_own() -> Iterator[Path | None]:
    """Make a control group whose memory is counted; None where the host does not allow that."""
    folder = None
    for parent in own_groups():
        with contextlib.suppress(OSError):
            control = parent / "cgroup.subtree_control"
            if control.exists() and "memory" not in control.read_text().split():
                control.write_text("+memory")
            made = parent / f"placement-{os.getpid()}-{time.monotonic_ns()}"
            made.mkdir()
            if (made / "memory.stat").exists():
                folder = made
                break
            made.rmdir()
    try:
        yield folder
    finally:
        if folder:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def held(free_bytes: int) -> Iterator[int]:
    """Leave this much of the card to others while the block runs; yield what is left, by NVML."""
    command = [sys.executable, str(HOLDER), str(free_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            answer = process.stdout.readline()
            if not answer.startswith("free "):
                raise RuntimeError(f"the holder of the card's memory says {answer.strip()!r}, not what it left free")
            yield int(answer.split()[1])
        finally:
            process.stdin.close()
            process.wait(timeout=60)


class Peak:
    """The most that the card had in use while a block ran."""

    def __init__(self) -> None:
        self.used = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        with Reader() as reader:
            while not self._ends.wait(SAMPLE_SECONDS):
                self.used = max(self.used, used_bytes(reader))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(30)


# --- The server


class Server:
    """A llama-server and its log."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], port: int, group: Path | None = None) -> None:
        """group: a control group that it enters."""
        self.port, self.lines = port, list[str]()
        enter = ["/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"', str(group / "cgroup.procs")] if group else []
        self._process = subprocess.Popen(
            [*enter, *command, "--verbosity", "4"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env={**os.environ, **variables},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)

    def wait(self, seconds: float) -> float | None:
        """Return the seconds until it answered; None if it ended or did not in time."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if http(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200:
                    return time.monotonic() - began
            time.sleep(0.1)
        return None

    def complete(self, tokens: Sequence[int], n_predict: int) -> dict[str, Any]:
        """Return the answer to a prompt of token ids, or what went wrong."""
        body = {
            "prompt": list(tokens), "n_predict": n_predict, "temperature": 0, "ignore_eos": True, "cache_prompt": False
        }  # fmt: skip
        try:
            answer = http(f"http://127.0.0.1:{self.port}/completion", body, timeout=REQUEST_SECONDS)
            found = answer.json if answer.status == 200 else {"error": answer.text[:300]}
        except (OSError, urllib.error.URLError, ValueError) as error:
            found = {"error": repr(error)}
        timings = found.get("timings", {})
        return {
            "prompt_tokens": timings.get("prompt_n"),
            "answer_tokens": timings.get("predicted_n"),
            "prompt_per_second": timings.get("prompt_per_second"),
            "answer_per_second": timings.get("predicted_per_second"),
            "error": found.get("error"),
        }

    def resident(self) -> dict[str, int]:
        """Return its resident bytes by kind: RssAnon, RssFile, RssShmem."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return {kind: int(size) * 1024 for kind, size in re.findall(r"^(Rss\w+):\s+(\d+) kB", text, re.MULTILINE)}

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def ending(self) -> str:
        """Its exit code in words."""
        code = self._process.poll()
        return "still running" if code is None else f"exit code {code}"

    @property
    def buffers(self) -> dict[str, float]:
        """MiB by place and purpose: {"CUDA0 model": 9154.43}; what it only tried before it loaded is left out."""
        text = "\n".join(self.lines).rpartition(_LOADING)[2]
        found: dict[str, float] = {}
        for place, what, size in _BUFFER.findall(text):
            key = f"{'card' if place.startswith('CUDA') and 'Host' not in place else 'host'} {what}"
            found[key] = round(found.get(key, 0.0) + float(size), 2)
        return found


def prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """Return token ids that differ from those of other requests from the first one on."""
    draw = np.random.default_rng(number)
    return [int(token) for token in draw.integers(3, min(vocabulary, 20000), length)]


def beside_buffers(case: Case, server: str, path: Path) -> int:
    """Return what a server takes of the card beside the buffers of its log, with a small model of the case's kind.

    It has computed in small batches: its context and the kernels for such a model, but next to nothing in pools.
    """
    before, port = used_bytes(), free_port()
    kv_cache = "q8_0" if case.settings.get("kv_cache") else "f16"
    command = [server, "--model", str(path), "--port", str(port), "--ctx-size", "1024", "--parallel", "1"]
    command += ["--ubatch-size", str(TINY_BATCH), "--cache-type-k", kv_cache, "--cache-type-v", kv_cache]
    command += ["--n-gpu-layers", "999", *(["--n-cpu-moe", "2"] if "experts" in shape_of(case) else [])]
    with Server(command, {}, port) as running:
        if running.wait(START_SECONDS) is None:
            raise RuntimeError("the tiny model does not start:\n" + "\n".join(running.lines[-20:]))
        running.complete(prompt(1, 200, 1000), 4)
        used = used_bytes() - before
        buffers = sum(size for key, size in running.buffers.items() if key.startswith("card")) * MIB
    path.unlink()
    return max(0, round(used - buffers))


TINY_LAYERS, TINY_EXPERTS, TINY_BATCH = 4, 16, 64
WHOLE = ("DeepSeek-V2-Lite",)
"""llama.cpp knows it, which has no low-rank query, by its number of layers."""


def shape_of(case: Case) -> dict[str, Any]:
    """Return the shape of a case's file."""
    shape = shape_named(case.model, case.layers)
    if case.experts and "experts" in shape:
        shape |= {"experts": min(case.experts, shape["experts"])}
    return shape


def gpu_is_absent() -> bool:
    """Whether NVML shows no GPU."""
    try:
        gpu_memory()
    except MissingError:
        return True
    return False


# --- One case


def write_file(case: Case, path: Path) -> None:
    """Write the file of a case, and the small one beside it."""
    small = replace(case, layers=case.layers if case.model in WHOLE else TINY_LAYERS, experts=TINY_EXPERTS)
    write_catalog_file(path.with_suffix(".tiny"), shape_of(small))
    fill(write_catalog_file(path, shape_of(case)))


def read_through(path: Path) -> float:
    """Read the whole file, so that a server finds it in the page cache; return bytes per second."""
    size, began = path.stat().st_size, time.monotonic()

    def part(start: int) -> None:
        piece = bytearray(READ_BYTES)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            file.readinto(piece)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(part, range(0, size, READ_BYTES)))
    return size / (time.monotonic() - began)


def one(case: Case, server: str, path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a case."""
    shape = shape_of(case)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_through, path)
        beside = 0 if gpu_is_absent() else beside_buffers(case, server, path.with_suffix(".tiny"))
        say(f"{case.model}: read at {reading.result() / 1e9:.1f} GB/s")
    say(f"{case.model}: beside its buffers a small one takes {beside / MIB:,.0f} MiB")
    card = load_card(case.card)
    settings = settings_of(case, path, server)
    plan = plan_of(settings, path, card.memory_bytes, case.card, facts)
    constants = sum(part.n_bytes for part in plan.parts if part.key == "context")
    # More multiprocessors divide attention among more blocks.
    further = 0 if gpu_is_absent() else max(0, pool_here(plan, path) - plan.part("workspace"))
    row: dict[str, Any] = {
        "case": asdict(case), "plan": plan.to_json(), "card_bytes": card.memory_bytes, "beside": beside, "kept": False,
        "pool_here": plan.part("workspace") + further,
    }  # fmt: skip
    try:
        if not plan.fits:
            row["error"] = plan.reasons[0]
        elif gpu_is_absent():
            row |= serve(case, settings, path, plan, shape["vocab"])
        else:
            with held(card.memory_bytes + max(0, beside - constants) + further) as free:
                row |= {"free_bytes": free} | serve(case, settings, path, plan, shape["vocab"])
    except (RuntimeError, PascalineError, OSError) as error:
        row["error"] = str(error)
    finally:
        path.unlink()
    row["kept"] = is_kept(row)
    return row


def settings_of(case: Case, path: Path, server: str) -> Settings:
    """Return the settings of an instance."""
    return Settings.model_validate(
        {
            "model": str(path),
            "engine": ENGINE,
            "device": "cuda",
            "engine_executable": server,
            "context_length": case.context,
            "max_running_requests": case.requests,
            "port": free_port(),
            **case.settings,
        }
    )


def plan_of(settings: Settings, path: Path, free: int, card: str | None, facts: dict[str, Any]) -> Plan:
    """Plan for a card of this much memory; card None: for the speed of the GPU that is here."""
    spec = read_gguf(path)
    found = load_card(card) if card else _this_card()
    rates = HostRates(
        memory_bytes_per_second=min(facts["host_bytes_per_second"]), source=f"measured {facts['date']}",
        link_bytes_per_second=None if card else link(), cores=settings.threads,
    )  # fmt: skip
    request = request_from_settings(
        settings, spec, device="cuda", dtype="float16", card_bytes=free, host_memory_bytes=host_memory().total_bytes,
        host_rates=rates,
    )  # fmt: skip
    is_free = "chunked_prefill_tokens" not in settings.model_fields_set
    return with_hints(make_plan(spec, found, request), spec, found, request, chunk_is_free=is_free)


def pool_here(plan: Plan, path: Path) -> int:
    """Return the plan's bytes of the kernels' pool if this GPU is the card."""
    return make_plan(read_gguf(path), _this_card(), plan.request).part("workspace")


def _this_card() -> Any:
    memory = gpu_memory()
    return unknown_card(memory.name, memory.total_bytes, memory.rates)


def link() -> float | None:
    """Return the rate of the first GPU's PCIe link as the kernel reports it."""
    gpus = gpu_memory().gpus
    return link_rate(gpus[0].address) if gpus and gpus[0].address else None


def serve(case: Case, settings: Settings, path: Path, plan: Plan, vocabulary: int) -> dict[str, Any]:
    """Start the server as the plan says, fill all of its slots, and return what was seen."""
    model = ResolvedModel("gguf", path, read_gguf(path), case.model)
    configuration = Configuration(settings, {}, case.card)
    launch = engine_named(ENGINE).launch(make_task(configuration, model, plan, path.parent))
    variables, before, shared = dict(launch.environment), used_bytes(), charged_bytes(own_groups())
    with (
        group_of_its_own() as group,
        Peak() as peak,
        Server(launch.command, variables, settings.port, group) as server,
    ):
        say(f"{case.model}: {' '.join(launch.command[1:])}")
        row: dict[str, Any] = {"command": list(launch.command[1:]), "ready_seconds": server.wait(START_SECONDS)}
        row["buffers"] = server.buffers
        if row["ready_seconds"] is None:
            return row | {"error": f"it did not start: {server.ending}", "log": server.lines[-25:]}
        row["used_when_ready"] = used_bytes() - before
        charged = charged_bytes([group]) if group else charged_bytes(own_groups()) - shared
        row["resident"] = server.resident() | {"cgroup": charged, "alone": group is not None}
        if case.has_speed and not gpu_is_absent():
            row["speed"] = speed(server, settings, path, plan, vocabulary)
        began = time.monotonic()
        with ThreadPoolExecutor(case.requests) as pool:
            prompts = [
                prompt(number, case.context - ANSWER_TOKENS, vocabulary) for number in range(1, case.requests + 1)
            ]
            row["answers"] = list(pool.map(lambda tokens: server.complete(tokens, ANSWER_TOKENS), prompts))
        row["seconds"] = round(time.monotonic() - began, 1)
        if any(answer["error"] for answer in row["answers"]):
            row |= {"error": f"not answered whole: {server.ending}", "log": server.lines[-25:]}
    return row | {"used_at_peak": max(0, peak.used - before)}


def speed(server: Server, settings: Settings, path: Path, plan: Plan, vocabulary: int) -> dict[str, Any]:
    """Return tok/s of one request, beside the range for this GPU and this host with the same placement."""
    own = settings.model_copy(
        update={
            "context_length": SPEED_PROMPT,
            "max_running_requests": 1,
            "chunked_prefill_tokens": plan.request.chunked_prefill_tokens,
            "placement": settings.placement.model_copy(update={"experts": plan.request.expert_layers_on_host}),
        }
    )
    facts = {"host_bytes_per_second": [plan.request.host_rates.memory_bytes_per_second], "date": ""}
    expected = plan_of(own, path, 2**40, None, facts).speed
    server.complete(prompt(90, 64, vocabulary), 2)
    began, busy, own = time.monotonic(), busy_seconds(), server.cpu_seconds()
    answers = [server.complete(prompt(91 + number, 16, vocabulary), SPEED_ANSWER) for number in range(SPEED_REPEATS)]
    others = (busy_seconds() - busy - server.cpu_seconds() + own) / (time.monotonic() - began)
    long = server.complete(prompt(89, SPEED_PROMPT, vocabulary), 1)
    rates = [answer["answer_per_second"] for answer in answers]
    found = {"decode": None if None in rates else max(rates), "decodes": rates, "others_cpus": round(others, 1)}
    found |= {"prefill": long["prompt_per_second"], "link": link()}
    if expected is None:
        return found
    return found | {
        "decode_range": [expected.single.low, expected.single.high],
        "prefill_range": [expected.prefill.low, expected.prefill.high],
        "decode_formula": expected.single.formula,
        "prefill_formula": expected.prefill.formula,
    }


def busy_seconds() -> float:
    """Return the CPU time that all programs of the host have used."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def is_kept(row: dict[str, Any]) -> bool:
    """Whether every request was answered whole, and no buffer is larger than planned."""
    wanted = [row["case"]["context"] - ANSWER_TOKENS, ANSWER_TOKENS]
    answers = [[answer["prompt_tokens"], answer["answer_tokens"]] for answer in row.get("answers", [])]
    whole = len(answers) == row["case"]["requests"] and all(answer == wanted for answer in answers)
    return whole and all(logged <= planned + 0.02 for _, planned, logged in compared(row))


def compared(row: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return each buffer's name, planned MiB and MiB of the log."""
    parts = {part["key"]: part["bytes"] / MIB for part in row["plan"]["parts"] + row["plan"]["host_parts"]}
    log = row.get("buffers", {})
    pairs = [
        ("card: weights", parts.get("weights", 0.0), log.get("card model", 0.0)),
        ("card: KV cache", parts.get("kv_pool", 0.0), log.get("card KV", 0.0) + log.get("card RS", 0.0)),
        ("card: compute buffer", parts.get("activations", 0.0), log.get("card compute", 0.0)),
        ("host: weights", parts.get("host_weights", 0.0), log.get("host model", 0.0)),
        ("host: KV cache", parts.get("host_kv", 0.0), log.get("host KV", 0.0) + log.get("host RS", 0.0)),
        ("host: compute buffer", parts.get("host_compute", 0.0), log.get("host compute", 0.0)),
    ]
    # A build for the CPU has everything on the host.
    return pairs if any(key.startswith("card") for key in log) else []


def fill(path: Path) -> None:
    """Give embeddings and routers random values and norms ones, so that each token chooses experts of its own."""
    draw = np.random.default_rng(1)
    for tensor in GGUFReader(path, "r+").tensors:
        data, kind = tensor.data, tensor.tensor_type.name
        if tensor.name.endswith("norm.weight"):
            data[:] = 1.0
        elif ".ffn_gate_inp.weight" in tensor.name:
            data[:] = draw.standard_normal(data.shape, dtype=np.float32)
        elif tensor.name == "token_embd.weight" and kind in SCALES:
            _fill_blocks(data, kind, draw)


SCALES = {"Q4_K": (144, (0,)), "Q6_K": (210, (208,)), "Q8_0": (34, (0,))}
"""Bytes of a block, and where it has its scale in half precision (ggml-common.h)."""
_ROWS = 20000
"""Of the embedding, as many as prompts use."""


def _fill_blocks(data: Any, kind: str, draw: np.random.Generator) -> None:
    size, places = SCALES[kind]
    rows = data[:_ROWS]
    blocks = draw.integers(0, 256, (rows.shape[0], rows.shape[1] // size, size), dtype=np.uint8)
    for place in places:
        blocks[:, :, place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    if kind == "Q4_K":
        blocks[:, :, 2:4] = 0
    rows[:] = blocks.reshape(rows.shape)


# --- What was found


def summary(row: dict[str, Any]) -> str:
    """Return plan beside log in lines of text."""
    case, planned = row["case"], row["plan"]
    lines = [
        f"{case['model']} on {case['card']}, {case['requests']} x {case['context']} tokens, KV {planned['kv_dtype']}: "
        f"{planned['where']}: {'kept' if row['kept'] else 'NOT KEPT'}"
    ]
    lines += [
        f"  {name:22} planned {planned:10,.2f}   log {logged:10,.2f} MiB" for name, planned, logged in compared(row)
    ]
    if "used_at_peak" in row:
        free = row.get("free_bytes", 0) / MIB
        lines.append(
            f"  at the peak {row['used_at_peak'] / MIB:,.0f} MiB of {free:,.0f} that were free, "
            f"when ready {row['used_when_ready'] / MIB:,.0f}; pools {pools(row) / MIB:,.0f}; "
            f"{row['seconds']} s for the requests, {row['ready_seconds']:.0f} s to start"
        )
        lines.append("  " + json.dumps(row["answers"]))
    if "speed" in row:
        lines.append("  " + json.dumps(row["speed"]))
    if "error" in row:
        lines += ["  " + row["error"], *("  | " + line for line in row.get("log", []))]
    return "\n".join(lines)


def pools(row: dict[str, Any]) -> int:
    """Return what it took at the peak beside the buffers of its log and what a tiny model takes, bytes."""
    buffers = sum(size for key, size in row["buffers"].items() if key.startswith("card")) * MIB
    return round(row["used_at_peak"] - buffers - row["beside"])


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the page of one or more runs."""
    rows = [row for result in results for row in result["rows"]]
    machines = list(dict.fromkeys(machine_words(result) for result in results))
    lines = [
        "# Plans with weights in the host's memory, on a GPU held to a small card's memory",
        "",
        f"{results[0]['machine']['gpu']}, llama-server {results[0]['machine']['server']} built as code for compute "
        f"capability 6.1; `benchmarks/placement_held.py`. {'; '.join(machines)}. Another process holds all of the "
        "GPU's memory except what the card of the plan has. The files have the models' true shapes.",
        "",
        "The context and the kernels of this GPU are larger than a Pascal card's: what a server with a small model of "
        "the same kind takes beside the buffers of its log is measured, and that much is free instead of the CUDA "
        "context in the plan, which is an estimate for Pascal cards. What this GPU's pool may take beyond the card's "
        "is free too: it has more multiprocessors, among which attention divides smaller batches further.",
        "",
        "MiB, planned / in llama-server's log:",
        "",
        "| model | card | requests | on the host | weights, card | KV cache, card | compute, card | weights, host "
        "| KV cache, host |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case, found = row["case"], {name: (a, b) for name, a, b in compared(row)}
        cells = [f"{a:,.1f} / {b:,.1f}" for a, b in (found.get(name, (0.0, 0.0)) for name in _COLUMNS)]
        kv = row["plan"]["kv_dtype"]
        head = f"{case['model']} | {case['card']} | {case['requests']} x {case['context']:,}, KV {kv}, chunk "
        head += f"{row['plan']['chunked_prefill_tokens']:,} | {row['plan']['where'].removesuffix(' on the host')}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    lines += [
        "",
        "Then every slot got a prompt that fills its context but for "
        f"{ANSWER_TOKENS} tokens, all at once, with {ANSWER_TOKENS} tokens to answer:",
        "",
        "| model | card | answered whole | in use at the peak, MiB | free before, MiB "
        "| of it a small model, MiB | beyond that and the buffers, MiB | the plan for pools, page tables and "
        "fragmentation, MiB: the card, this GPU | seconds, all requests |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case, wanted = row["case"], [row["case"]["context"] - ANSWER_TOKENS, ANSWER_TOKENS]
        answers = row.get("answers", [])
        whole = sum([answer["prompt_tokens"], answer["answer_tokens"]] == wanted for answer in answers)
        if answers:
            figures = f"{row['used_at_peak'] / MIB:,.0f} | {row.get('free_bytes', 0) / MIB:,.0f}"
            parts = {part["key"]: part["bytes"] for part in row["plan"]["parts"]}
            beside = parts["fragmentation"] + parts.get("page_tables", 0)
            spare = [size + beside for size in (parts["workspace"], row["pool_here"])]
            figures += f" | {row['beside'] / MIB:,.0f} | {pools(row) / MIB:,.0f}"
            figures += f" | {spare[0] / MIB:,.0f}, {spare[1] / MIB:,.0f} | {row['seconds']}"
        else:
            figures = f"{row.get('error', '')} | | | | |"
        lines.append(f"| {case['model']} | {case['card']} | {whole} of {case['requests']} | {figures} |")
    lines += ["", "The host's memory when it was ready, MiB:", ""]
    lines += ["| model | card | plan without kept prompts | shared (pinned) | anonymous | the control group's charge |"]
    lines += ["|---|---|---|---|---|---|", *(host_line(row) for row in rows if "resident" in row)]
    for row in rows:
        lines += ["", *speed_lines(row)] if "speed" in row else []
    return "\n".join(lines)


_COLUMNS = ("card: weights", "card: KV cache", "card: compute buffer", "host: weights", "host: KV cache")


def machine_words(result: dict[str, Any]) -> str:
    """Return the host of a run in words, with its date and models."""
    facts = result["machine"]
    bandwidth = " and ".join(f"{rate / 1e9:,.0f}" for rate in facts["host_bytes_per_second"])
    models = ", ".join(row["case"]["model"] for row in result["rows"])
    return f"{models}: {facts['cpu']} with {facts['cpus']} CPUs that read {bandwidth} GB/s, {facts['date']}"


def host_line(row: dict[str, Any]) -> str:
    """Return the row of a table about the host's memory."""
    planned = sum(part["bytes"] for part in row["plan"]["host_parts"] if part["key"] != "host_prompts")
    found = row["resident"]
    sizes = (planned, found.get("RssShmem", 0), found.get("RssAnon", 0), found["cgroup"])
    cells = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
    return f"| {row['case']['model']} | {row['case']['card']} | {cells} |"


def speed_lines(row: dict[str, Any]) -> list[str]:
    """Return the paragraph about the speed of one placement."""
    found = row["speed"]

    def beside(phase: str) -> str:
        low, high = found.get(f"{phase}_range", (0.0, 0.0))
        if found[phase] is None:
            return "not measured"
        return f"{found[phase]:,.0f} tok/s, the plan for this GPU and host says {low:,.0f} to {high:,.0f}"

    threads = row["command"][row["command"].index("--threads") + 1]
    busy = f" (other programs used {found['others_cpus']:,.0f} CPUs)" if "others_cpus" in found else ""
    return [
        f"Speed of {row['case']['model']} with {row['plan']['where']} and {threads} threads, one request: "
        f"decode {beside('decode')}{busy}; a "
        f"prompt of {SPEED_PROMPT:,} tokens {beside('prefill')}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
