"""Compares the planner with gguf-parser and with what llama.cpp itself allocates, on the same model files.

    python benchmarks/plan_compare.py [--models llama-2-7b,qwen3-4b] [--contexts 2048,4096,8192] [--json]

The truth is llama.cpp's own log: it loads each file on the CPU and reports what it allocates for weights, KV cache and
computation. The files are sparse (weights of zeros), with the published sizes. It looks on PATH for `gguf-parser`
(github.com/gpustack/gguf-parser-go, its folder cmd/gguf-parser) and `llama-completion` (llama.cpp); if one is missing,
its columns stay empty, and the last lines say so. One request, fp16 KV cache, flash attention, batches of 512.

KV: bytes of the cache. CPU: all memory with no layer on a GPU, weights included. GPU: memory with all layers there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MIB = 1 << 20
CARD = "tesla-p40"
"""Large enough that every file fits."""
BUFFERS = ("weights", "kv_pool", "activations")
"""Parts of a plan that llama.cpp allocates as buffers."""
BATCH = 512
TIMEOUT_SECONDS = 300
_ALLOCATED = re.compile(r"(model|KV|compute|output|RS) buffer size = +([0-9.]+) MiB")


@dataclass
class Row:
    """One file at one context; bytes, None if no program reports it."""

    model: str
    mixture: str
    context: int
    weights_file: int
    kv_true: int | None = None
    kv_gguf_parser: int | None = None
    kv_pascaline: int | None = None
    cpu_true: int | None = None
    cpu_gguf_parser: int | None = None
    cpu_pascaline: int | None = None
    gpu_gguf_parser: int | None = None
    gpu_pascaline: int | None = None


def allocated_by_llama_cpp(path: Path, context: int) -> dict[str, int]:
    """Return the bytes that llama.cpp reports as allocated, by purpose; empty if the program is missing."""
    program = shutil.which("llama-completion")
    if program is None:
        return {}
    sizes = ["-c", str(context), "-b", str(BATCH), "-ub", str(BATCH), "-ngl", "0", "-n", "1"]
    how = ["-fa", "on", "--no-warmup", "--no-repack", "-no-cnv", "-p", "x", "-v"]
    answer = subprocess.run(
        [program, "-m", str(path), *sizes, *how], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", timeout=TIMEOUT_SECONDS, check=True,
    )  # fmt: skip
    # A first pass without memory checks whether the model fits; allocations follow the last opening of the file.
    log = (answer.stdout + answer.stderr).rpartition("loaded meta data")[2]
    found: dict[str, int] = {}
    for what, mebibytes in _ALLOCATED.findall(log):
        found[what] = found.get(what, 0) + int(float(mebibytes) * MIB)
    return found


def estimated_by_gguf_parser(path: Path, context: int) -> tuple[int, int, int] | None:
    """Return gguf-parser's estimates: (KV cache, everything on the CPU, everything on the GPU)."""
    program = shutil.which("gguf-parser")
    if program is None:
        return None
    gpu = _gguf_parser(program, path, context, "-1")["vrams"][0]
    cpu = _gguf_parser(program, path, context, "0")["ram"]
    # It prints only sums. The cache is the growth per token of the estimate with unified memory, times the context.
    # A second context 2,048 further gives the slope; sliding-window layers have none, and are missing from it.
    more = _gguf_parser(program, path, context + 2048, "-1")["vrams"][0]
    slope = (more["uma"] - gpu["uma"]) / 2048
    return int(slope * context), cpu["nonuma"], gpu["nonuma"]


def _gguf_parser(program: str, path: Path, context: int, layers: str) -> dict:
    arguments = [
        "--path",
        str(path),
        "--ctx-size",
        str(context),
        "--gpu-layers",
        layers,
        "--flash-attention",
        "--no-mmap",
    ]
    sizes = ["--batch-size", str(BATCH), "--ubatch-size", str(BATCH), "--platform-footprint", "0,0"]
    command = [program, *arguments, *sizes, "--estimate", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS)
    return json.loads(answer.stdout)["estimate"]["items"][0]


def planned_by_pascaline(path: Path, context: int, card: str) -> dict:
    """Return the plan of `pascaline plan --json` for llama.cpp on a card; empty if it cannot be made."""
    command = [sys.executable, "-m", "pascaline", "plan", str(path), "--engine", "llama.cpp", "--card", card]
    options = ["--context", str(context), "--requests", "1", "--json"]
    answer = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    if not answer.stdout.startswith("{"):
        print(f"no plan for {path.name}: {answer.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    return json.loads(answer.stdout)


def compare(path: Path, model: str, mixture: str, context: int) -> Row:
    """Return all answers for one file at one context."""
    from pascaline.models.gguf import read_gguf

    row = Row(model, mixture, context, read_gguf(path).weights_bytes)
    if allocated := allocated_by_llama_cpp(path, context):
        row.kv_true, row.cpu_true = allocated.get("KV"), sum(allocated.values())
    if estimated := estimated_by_gguf_parser(path, context):
        row.kv_gguf_parser, row.cpu_gguf_parser, row.gpu_gguf_parser = estimated
    plan = planned_by_pascaline(path, context, CARD)
    row.kv_pascaline, row.gpu_pascaline = plan.get("kv_bytes"), plan.get("total_bytes")
    # llama.cpp logs only its buffers, not what else the process takes.
    parts = planned_by_pascaline(path, context, "cpu").get("parts", [])
    if parts:
        row.cpu_pascaline = sum(part["bytes"] for part in parts if part["key"] in BUFFERS)
    return row


def table(rows: list[Row]) -> str:
    """Return the rows as text, sizes in MiB."""
    numbers = (
        "kv_true",
        "kv_gguf_parser",
        "kv_pascaline",
        "cpu_true",
        "cpu_gguf_parser",
        "cpu_pascaline",
        "gpu_gguf_parser",
        "gpu_pascaline",
    )
    lines = [
        f"{'':<30}{'KV cache, MiB':^39}{'on the CPU, MiB':^39}{'on the GPU, MiB':^26}",
        f"{'model':<13}{'mixture':<9}{'context':>8}"
        + "".join(f"{title:>13}" for title in 2 * ("llama.cpp", "gguf-parser", "pascaline"))
        + "".join(f"{title:>13}" for title in ("gguf-parser", "pascaline")),
    ]
    for row in rows:
        values = [getattr(row, number) for number in numbers]
        cells = "".join(f"{'-' if value is None else format(value / MIB, '.1f'):>13}" for value in values)
        lines.append(f"{row.model:<13}{row.mixture:<9}{row.context:>8}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Make the files, ask everyone, print the table."""
    from support.models import SHAPES, write_gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama-2-7b,llama-3.1-8b,qwen2.5-7b,qwen3-4b,gemma-2-9b,gemma-3-4b")
    parser.add_argument("--mixture", default="Q4_K_M", help="tensor types, as llama-quantize names them")
    parser.add_argument("--contexts", default="2048,4096,8192", help="tokens")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(Path(folder) / f"{model}.gguf", SHAPES[model], arguments.mixture, sparse=True)
            rows += [compare(path, model, arguments.mixture, int(context)) for context in arguments.contexts.split(",")]
    print(json.dumps([asdict(row) for row in rows], indent=2) if arguments.json else table(rows))
    for program in ("llama-completion", "gguf-parser"):
        if shutil.which(program) is None:
            print(f"{program} is not on PATH: its columns are empty", file=sys.stderr)


if __name__ == "__main__":
    main()
