"""Compares the plan with SGLang's allocations: weights, KV cache and tables to the byte; on a GPU also the total.

    python benchmarks/plan_error.py [--device cpu|cuda] [--models llama,qwen3] [--contexts 512,1024,2048] [--json]
    python benchmarks/plan_error.py --device cuda                     # seven models with float16 weights, a few minutes
    python benchmarks/plan_error.py --device cuda --gguf Q4_K_M       # six whose weights stay quantised

Each model has random weights. SGLang itself loads it in a separate process, with the flags of the plan
(tests/support/sglang_allocations.py). Nearly all of the time is imports: --ahead processes import together before the
first of them measures; then they measure one after the other. On a GPU, models of a gigabyte are made, and the driver's
count of used memory, after a prefill and some decode steps, is compared with the plan's total; nothing else may use the
GPU meanwhile. --card names the profile whose constants are used; without it, this GPU's profile. For a GPU without a
profile, the measured size of its CUDA context is used, which no plan can know.

Exit code 0: everything is within its limits; 1: something is not, or failed; 6: there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hf_models import write_folder, write_mixture_of_experts  # noqa: E402
from support.models import Shape, tiny, write_gguf  # noqa: E402

MIB = 1 << 20
REQUESTS = 4
TIMEOUT_SECONDS = 600
ALLOWED_SHARE, ALLOWED_BYTES = 0.03, 150 * MIB
"""A total may miss by the larger of the two."""
BUSY_BYTES = 1 << 30
"""With this much memory in use on a GPU, another program must be using it."""
IMPORT_BYTES = 3 << 30
"""Memory that a process with SGLang's modules may take; limits how many processes import together."""
FRACTION = {"cpu": "0.5", "cuda": "0.85"}
"""--mem-fraction-static, of this machine's memory whatever the plan's card has; the pool is bounded by its tokens."""
NO_GRAPHS = ["--cuda-graph-backend-decode", "disabled"]
"""For experts: SGLang's torch code asks the GPU for the number of tokens of each, which no recorded step can do."""
CHILD = ROOT / "tests/support/sglang_allocations.py"

LARGE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 32064}
"""About a gigabyte in float16: small enough to be written in seconds, large enough for 3 % to be meaningful."""


@dataclass
class Row:
    """One model at one context; bytes."""

    model: str
    context: int
    dtype: str
    weights_plan: int
    weights_true: int
    kv_plan: int
    kv_true: int
    tables_plan: int
    tables_true: int
    total_plan: int | None = None
    total_true: int | None = None
    """On a GPU: what the driver counts beyond what was used before, after some work."""
    context_true: int | None = None
    """On a GPU: what the driver counts once torch has made its context, before anything is loaded."""
    idle_true: int | None = None
    """On a GPU: what the driver counts when the model is loaded and nothing was computed yet."""
    reserved_true: int | None = None
    """On a GPU: what torch's allocator holds in the end."""
    peak_true: int | None = None
    """On a GPU: the most that tensors took at once."""
    plan_parts: dict[str, int] | None = None
    failure: str | None = None
    """Why the model failed at work although it was loaded."""

    @property
    def is_exact(self) -> bool:
        """Whether weights and KV cache are equal to the byte."""
        return self.weights_plan == self.weights_true and self.kv_plan == self.kv_true

    @property
    def total_is_close(self) -> bool:
        """Whether the total is within its limits; True without a total."""
        if self.total_plan is None or self.total_true is None:
            return True
        return abs(self.total_plan - self.total_true) <= max(ALLOWED_SHARE * self.total_true, ALLOWED_BYTES)

    @property
    def is_good(self) -> bool:
        """Whether nothing is off by more than is allowed, and nothing failed."""
        return self.is_exact and self.total_is_close and self.failure is None


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU, as nvidia-smi shows it."""

    name: str
    driver: str
    total_bytes: int
    used_bytes: int


def find_gpu() -> Gpu | None:
    """Return the GPU to measure on; None without one."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-i", index, query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    name, driver, total, used = answer.stdout.strip().split(", ")
    return Gpu(name, driver, int(total) * MIB, int(used) * MIB)


def shapes(*, large: bool) -> dict[str, Shape]:
    """Return the models: with and without grouped queries, four families, sliding windows, a padded vocabulary."""
    sizes = {"num_heads": 16, "num_kv_heads": 4, **LARGE} if large else {}
    heads = 16 if large else 8
    return {
        "llama": tiny("llama", **sizes),
        "llama-mha": tiny("llama", **(sizes | {"num_kv_heads": heads})),
        "qwen2": tiny("qwen2", **(sizes | {"vocab_size": 32000 + 7 if large else 500})),
        "qwen3": tiny("qwen3", **(sizes | {"tied_embeddings": True})),
        "gemma2": tiny("gemma2", **sizes),
        "gemma3": tiny("gemma3", **(sizes | {"rope_theta": 1_000_000.0})),
        "qwen3-moe": tiny("qwen3", **sizes),
    }


def write_model(folder: Path, name: str, shape: Shape, *, gguf: str | None) -> Path:
    """Write the model of that name; gguf: the mixture of a GGUF file instead of a folder."""
    if gguf is not None:
        caps = {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}
        metadata = caps if shape.architecture == "gemma2" else None
        return write_gguf(folder / f"{name}.gguf", shape, gguf, metadata=metadata)
    if name == "qwen3-moe":
        size = shape.intermediate_size // 4
        return write_mixture_of_experts(folder / name, shape, experts=8, used=2, expert_size=size)
    return write_folder(folder / name, shape)


class Measurer:
    """Processes that import SGLang together, while nothing is measured, and then measure one model each.

    All of a group finish their imports before the first one starts, so the GPU memory that an import takes is part of
    what was used before.
    """

    def __init__(self, device: str, *, python: str = sys.executable, jobs: int = 1, ahead: int = 1) -> None:
        """jobs: models that will be measured; ahead: processes that import together."""
        self._python, self._device, self._jobs, self._ahead = python, device, jobs, ahead
        self._waiting: list[_Child] = []

    def __call__(self, model: Path, flags: list[str]) -> dict[str, Any]:
        """Return what SGLang allocates for a model under these flags."""
        if not self._waiting:
            self._waiting = [_Child(self._python, self._device) for _ in range(max(1, min(self._ahead, self._jobs)))]
            try:
                for child in self._waiting:
                    child.wait_until_ready()
            except BaseException:
                self.close()
                raise
        self._jobs -= 1
        return self._waiting.pop(0).measure(["--model-path", str(model), "--device", self._device, *flags])

    def close(self) -> None:
        """End the processes that still wait."""
        for child in self._waiting:
            child.close()
        self._waiting = []


class _Child:
    """One process of tests/support/sglang_allocations.py."""

    def __init__(self, python: str, device: str) -> None:
        environment = os.environ | {
            "SGLANG_PLATFORM": "pascal",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # The core in Rust fails with torch from 2.11 on.
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
        }
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # A file, not a pipe: nothing reads it while the process waits.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [python, str(CHILD), "--wait"],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return when the imports are done."""
        timer = threading.Timer(TIMEOUT_SECONDS, self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if line.strip() == "ready":
                    return
        finally:
            timer.cancel()
        raise RuntimeError(f"SGLang was not imported, the process ended with {self.process.wait()}:\n{self._said()}")

    def measure(self, flags: list[str]) -> dict[str, Any]:
        """Let it load the model, and return what it found."""
        try:
            output, _ = self.process.communicate(f"{json.dumps(flags)}\n", timeout=TIMEOUT_SECONDS)
            lines = output.strip().splitlines()
            if self.process.returncode or not lines or not lines[-1].startswith("{"):
                raise RuntimeError(f"SGLang ended with {self.process.returncode}:\n{self._said()}")
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        finally:
            self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-3000:]


def compare(
    place: Path,
    name: str,
    context: int,
    *,
    device: str,
    card: str | None,
    kv_dtype: str = "auto",
    quantization: str | None = None,
    python: str = sys.executable,
    measure: Callable[[Path, list[str]], dict[str, Any]] | None = None,
) -> Row:
    """Plan a model, let SGLang allocate it with the plan's flags, and put both side by side."""
    from pascaline.cards import load_card, unknown_card
    from pascaline.models.reader import read_model
    from pascaline.planning import PlanRequest, make_plan

    dtype = "float32" if device == "cpu" else "float16"
    kv_dtype = {"float32": "fp32", "float16": "fp16"}[dtype] if kv_dtype == "auto" else kv_dtype
    spec = read_model(place)
    # Only constants come from the profile: the memory is that of a card on which everything fits.
    profile = load_card("cpu") if device == "cpu" else load_card(card) if card else unknown_card("GPU", 0)
    request = PlanRequest(
        card_bytes=64 << 30, device=device, dtype=dtype, kv_dtype=kv_dtype,
        context_length=context, max_running_requests=REQUESTS, max_total_tokens=REQUESTS * context,
        quantization=quantization,
    )  # fmt: skip
    plan = make_plan(spec, profile, request)
    assert plan.fits, plan.reasons
    flags = [*plan.engine_args, "--dtype", dtype]
    flags[flags.index("--mem-fraction-static") + 1] = FRACTION[device]
    if spec.num_experts:
        flags += NO_GRAPHS
    place = prepared(place, python)
    if quantization is not None:
        flags += ["--quantization", quantization]
    if place.is_dir() and (place / "pascal.json").exists():
        flags += ["--load-format", "pascal_gguf"]
    found = (measure or Measurer(device, python=python))(place, flags)
    row = Row(
        name, context, dtype, plan.weights_bytes, found["parameters_bytes"], plan.kv_bytes, found["kv_bytes"],
        plan.part("tables"), found["weights_bytes"] - found["parameters_bytes"] + found["request_table_bytes"],
    )  # fmt: skip
    if device == "cuda":
        row.total_plan, row.total_true, row.context_true = plan.total_bytes, found["used_bytes"], found["context_bytes"]
        row.idle_true, row.failure = found["idle_bytes"], found.get("failure")
        row.reserved_true, row.peak_true = found["torch_reserved_bytes"], found["torch_peak_bytes"]
        row.plan_parts = {part.key: part.n_bytes for part in plan.parts}
        if card is None:
            row.total_plan += row.context_true - plan.part("context")
        if spec.num_experts:
            row.total_plan -= plan.part("graphs")
    return row


def prepared(place: Path, python: str) -> Path:
    """Return the folder from which SGLang starts; for a GGUF file the plugin makes it."""
    if place.suffix != ".gguf":
        return place
    folder = place.with_suffix("")
    if folder.exists():
        return folder
    command = [python, "-m", "sglang_pascal", "prepare", str(place), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"failed to prepare {place.name}: {answer.stderr}")
    return folder


def table(rows: list[Row]) -> str:
    """Return the rows as text: planned sizes in MiB, and by how many bytes they are wrong."""
    lines = [
        f"{'':<22}{'weights':^26}{'KV cache':^26}{'tables':^26}{'total':^38}{'context':>10}",
        f"{'model':<14}{'context':>8}" + f"{'plan, MiB':>14}{'off by, B':>12}" * 3 + f"{'plan, MiB':>14}{'off by':>18}",
    ]
    for row in rows:
        cells = ""
        for plan, true in ((row.weights_plan, row.weights_true), (row.kv_plan, row.kv_true),
                           (row.tables_plan, row.tables_true)):  # fmt: skip
            cells += f"{plan / MIB:>14,.2f}{plan - true:>12,}"
        if row.total_plan is not None and row.total_true is not None:
            off = row.total_plan - row.total_true
            cells += f"{row.total_plan / MIB:>14,.1f}{off / MIB:>10,.1f} MiB{off / row.total_true:>8.1%}"
            cells += f"{(row.context_true or 0) / MIB:>10,.0f} MiB"
        lines.append(f"{row.model:<14}{row.context:>8,}{cells}")
    return "\n".join(lines)


def split_table(rows: list[Row]) -> str:
    """Return where a GPU's memory goes, planned and counted, MiB: shows what to correct if a total is off."""
    titles = ("context", "idle", "in the end", "reserved", "peak", "outside torch")
    lines = [f"{'':<22}{'counted':^84}  planned", f"{'model':<14}{'context':>8}" + "".join(f"{t:>14}" for t in titles)]
    for row in rows:
        if row.total_true is None or row.reserved_true is None:
            continue
        counted = (row.context_true, row.idle_true, row.total_true, row.reserved_true, row.peak_true,
                   row.total_true - row.reserved_true)  # fmt: skip
        cells = "".join(f"{(value or 0) / MIB:>14,.1f}" for value in counted)
        parts = ", ".join(f"{key} {n_bytes / MIB:,.1f}" for key, n_bytes in (row.plan_parts or {}).items() if n_bytes)
        lines.append(f"{row.model:<14}{row.context:>8,}{cells}  {parts}")
    return "\n".join(lines)


def verdict(rows: list[Row], failures: list[str]) -> str:
    """Return one line that says whether the plan is good enough, and further lines with what is not."""
    bad = [row for row in rows if not row.is_good]
    lines = [f"failed: {failure}" for failure in failures]
    for row in bad:
        words = [f"weights off by {row.weights_plan - row.weights_true:,} B"] * (row.weights_plan != row.weights_true)
        words += [f"KV cache off by {row.kv_plan - row.kv_true:,} B"] * (row.kv_plan != row.kv_true)
        if not row.total_is_close:
            words.append(f"total off by {((row.total_plan or 0) - (row.total_true or 0)) / MIB:,.1f} MiB")
        words += [f"failed at work: {row.failure}"] * (row.failure is not None)
        lines.append(f"off: {row.model} at {row.context:,}: {', '.join(words)}")
    totals = [row for row in rows if row.total_plan is not None and row.total_true is not None]
    what = "weights and KV cache equal to the byte"
    if totals:
        largest = max(abs((row.total_plan or 0) - (row.total_true or 0)) for row in totals)
        what += (
            f", totals within {ALLOWED_SHARE:.0%} or {ALLOWED_BYTES // MIB} MiB (largest miss {largest / MIB:,.1f} MiB)"
        )
    good, whole = len(rows) - len(bad), len(rows) + len(failures)
    lines.append(f"verdict: {'PASS' if good == whole and rows else 'FAIL'}: {what}: {good} of {whole}")
    return "\n".join(lines)


def machine(gpu: Gpu | None) -> str:
    """Return what was measured on, and when."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} of another interpreter"

    place = (
        f"{gpu.name}, {gpu.total_bytes // MIB:,} MiB, driver {gpu.driver}" if gpu else f"CPU, {os.cpu_count()} cores"
    )
    versions = f"{installed('torch')}, {installed('sglang')}, Python {platform.python_version()}"
    return f"{place}; {versions}; {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def ahead() -> int:
    """Return how many processes may import together on this machine: one per core, as far as the memory suffices."""
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, pages * size // IMPORT_BYTES))


def run(arguments: argparse.Namespace, card: str | None) -> tuple[list[Row], list[str]]:
    """Make each model and measure it at each context; return the rows, and what failed."""
    contexts = [int(context) for context in arguments.contexts.split(",")]
    available = shapes(large=arguments.device == "cuda")
    names = arguments.models.split(",") if arguments.models else [
        name for name in available if not (arguments.gguf and name == "qwen3-moe")
    ]  # fmt: skip
    jobs = len(names) * len(contexts)
    measure = Measurer(arguments.device, python=arguments.python, jobs=jobs, ahead=arguments.ahead)
    rows, failures = [], []
    try:
        for name in names:
            shape = replace(available[name], context_length=max(contexts))
            with tempfile.TemporaryDirectory() as folder:
                place = write_model(Path(folder), name, shape, gguf=arguments.gguf)
                for context in contexts:
                    try:
                        rows.append(compare(
                            place, name, context, device=arguments.device, card=card, python=arguments.python,
                            kv_dtype=arguments.kv_dtype, quantization=arguments.quantization, measure=measure,
                        ))  # fmt: skip
                    except (RuntimeError, subprocess.SubprocessError) as error:
                        failures.append(f"{name} at {context:,}: {error}")
                        print(failures[-1], file=sys.stderr, flush=True)
                    else:
                        # Reported at once, so that a run that is stopped still has results.
                        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    finally:
        measure.close()
    return rows, failures


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", help="names, separated by commas (default: all)")
    parser.add_argument("--contexts", default="512,1024,2048", help="tokens (default: %(default)s)")
    parser.add_argument("--gguf", metavar="MIXTURE", help="load GGUF files of this mixture instead of folders")
    parser.add_argument("--kv-dtype", default="auto", help="type of the KV cache: auto, int8, fp8_e5m2, bf16")
    parser.add_argument(
        "--quantization", help="as SGLang's flag; gguf keeps a GGUF file's types in memory on a CPU too"
    )
    parser.add_argument("--card", help="profile whose constants the plan takes on a GPU (default: this GPU's)")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter that can import sglang (default: this one)"
    )
    parser.add_argument("--ahead", type=int, default=ahead(), help="processes that import together (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    """Make the models, ask both, print the table and the verdict."""
    from pascaline.cards import card_for_device

    arguments = parse()
    gpu = find_gpu() if arguments.device == "cuda" else None
    if arguments.device == "cuda" and gpu is None:
        print("plan_error: no NVIDIA GPU is visible; run it where nvidia-smi lists one", file=sys.stderr)
        return 6
    card = arguments.card
    if gpu and not card and (own := card_for_device(gpu.name.removeprefix("NVIDIA "))):
        card = own.name
    print(machine(gpu), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if gpu and gpu.used_bytes > BUSY_BYTES:
        print(f"other processes hold {gpu.used_bytes // MIB:,} MiB of the GPU: totals may be off", file=sys.stderr)
    rows, failures = run(arguments, card)
    good = all(row.is_good for row in rows) and not failures
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        print(verdict(rows, failures), file=sys.stderr)
        return 0 if good else 1
    print(f"\n{table(rows)}\n")
    if gpu:
        print(f"constants of {card or 'a GPU without a profile, its context as measured'}\n\n{split_table(rows)}\n")
    print(verdict(rows, failures))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
