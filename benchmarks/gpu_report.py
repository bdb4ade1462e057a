"""Makes one report of quantised execution on this machine's GPU: one JSON file and one HTML file.

    python benchmarks/gpu_report.py OUT_DIR [--parts NAME ...] [--model FILE.gguf] [--ggml FILE] [--quick]

Parts, each with its date; a part that could not run says so:
  rates       instructions per clock and multiprocessor, bandwidth of a plain read
  selftest    every operation against its reference, with the code for sm_61 and with that for sm_60
  sanitizer   compute-sanitizer memcheck and racecheck on every kernel, if the program is installed
  products    decode and prefill products of three models' layers: microseconds, bandwidth, torch, and ggml
  attention   decode and prefill, against torch's scaled_dot_product_attention
  numerics    SGLang against the same weights in float32: the model of --model, and random ones of other types
  engine      SGLang with random weights in the shapes of Llama 3.1 8B and Qwen 2.5 7B, Q4_K_M, in 8 GB: speed, Triton
              kernels that were launched; and the first in the card's whole memory, with our kernels and without
  serve       `pascaline serve` with both files and --model in 8 GB, four requests of 4096 tokens, held to its plan
  servers     tokens/s over HTTP at 1, 2, 4 and 8 requests of SGLang and of llama-server, if it is on PATH
  tests       the tests that need a GPU

A file from an earlier run on the same card, driver and torch is kept, except for the parts that run now, so the report
can be made in pieces; each program is ended after a time limit. --ggml: output of ggml's `test-backend-ops perf` for
MUL_MAT and FLASH_ATTN_EXT on the same card (build it there from source, with the shapes of
`sglang_pascal.measure.SHAPES` as test cases). Unless the card's name is a Pascal card's, no figure is one of Pascal.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_page import as_html
from sglang_pascal import measure
from sglang_pascal.kernels.build import HEAD_DIMS, KV_TYPES
from sglang_pascal.kernels.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[1]

AIMS = {"Q4_K": {1: 0.45, 2: 0.38, 4: 0.30, 8: 0.22}, "other": {1: 0.5, 2: 0.45, 4: 0.35, 8: 0.3}}
"""Target share of ggml's time, by number of rows of x."""
SANITIZER_GROUPS = [
    ["quantize", "silu", "rms_norm", "NaN", "argmax", "rope_and_store", "matmul epilogue", "matmul float16"],
    ["top_k"],
    *([f"repack {name}", f"dequantize {name}", f"matmul {name} [33, 768]"] for name in FORMATS),
    ["matmul Q4_K [320, 4608]", "matmul Q6_K [320, 4608]"],
    [f"matmul {name} [33, 576]" for name, form in FORMATS.items() if form.short_tiles],
    *(
        [f"attention_decode {kv} head_dim {size}", f"attention_prefill {kv} head_dim {size}"]
        for kv in KV_TYPES
        for size in HEAD_DIMS
    ),
]
"""Cases that together start every kernel, one process each; the CUDA graph's kernels are the same."""
SANITIZER_PROCESSES = 10
"""Number that run at once: a checked kernel waits for the host most of the time."""
SELFTEST_SECONDS = 240
SANITIZER_SECONDS = 400
"""Time limit of one group of cases."""
ENGINE_SECONDS = 420
"""Time limit of one program that loads a model."""
TESTS_SECONDS = 570
BENCH_FLAGS = ("--sizes", "1,2,4,8", "--max-running-requests", "8", "--context-length", "4096", "--repeats", "3")
"""Flags of `pascaline bench batch`, for each engine: prompts and answers of 128 tokens."""
BENCH_FIGURES = ("output_throughput", "tpot_p50", "ttft_p50")
"""Figures of its results: tokens/s of all answers together, seconds per token and until the first."""
MEMORY_GIB = 7.4
"""Memory of a Tesla P4 for a process with torch: 7.6 minus the CUDA context."""
SHAPES = {"llama-3.1-8b": "Q4_K_M", "qwen2.5-7b": "Q4_K_M"}
"""Models made for the run: shape in `tests/support/models.py` -> mixture."""
REQUANTIZED = {"Q8_0": ["Q8_0"], "mixed": ["Q8_0", "Q4_0", "Q5_0", "F16", "Q4_1", "BF16"]}
"""Copies of --model whose numerics are measured too: name -> types of its matrices, in turn."""
RANDOM_TYPES = ("Q4_K_M", "Q8_0", "Q4_0")
"""Mixtures of small random models whose numerics are measured beside --model's."""

LOSSY = {
    "KV int8": ("--kv-cache-dtype", "int8"),
    "KV fp8_e5m2": ("--kv-cache-dtype", "fp8_e5m2"),
    "prompts in 8 bits": ("--prefill-bits", "8"),
    "everything in 8 bits": ("--prefill-bits", "8", "--decode-bits", "8"),
}
"""Settings whose cost in numerics is recorded: name -> flags of numerics.py."""


def environment() -> dict:
    """Return the card, the driver and what else decides the figures."""
    properties = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split(", ")
    return {
        "card": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": smi[0],
        "clocks_and_power": smi[1:],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": now(),
    }


def now() -> str:
    """Return the time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run_selftest(
    architecture: str, prefix: list[str] | None = None, names: list[str] | None = None, seconds: int = SELFTEST_SECONDS
) -> dict:
    """Run the selftest in its own process; return its outcomes, and a sanitizer's report."""
    command = [*(prefix or []), sys.executable, "-m", "sglang_pascal", "selftest", "--json", *(names or [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=os.environ | {"SGLANG_PASCAL_ARCHITECTURE": architecture},
        )
    except subprocess.TimeoutExpired:
        return {"state": f"not finished in {seconds} s"}
    text = done.stdout
    body = text[text.find("{") : text.rfind("}") + 1]
    facts = json.loads(body) if body else {"error": (done.stderr or text)[-2000:]}
    summary = re.findall(r"=+ (ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", text + done.stderr)
    return {
        "state": "clean" if done.returncode == 0 else f"exit code {done.returncode}",
        "seconds": round(time.monotonic() - start, 1),
        "sanitizer": summary,
        **facts,
    }


def find_sanitizer() -> str | None:
    """Return compute-sanitizer, which a CUDA toolkit does not always put on PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run_sanitizer() -> dict:
    """Run memcheck and racecheck on all kernels; return the result of each group of cases."""
    program = find_sanitizer()
    if program is None:
        return {"state": "compute-sanitizer is not installed"}
    jobs = [(tool, names) for names in SANITIZER_GROUPS for tool in ("memcheck", "racecheck")]

    def check(job: tuple[str, list[str]]) -> dict:
        tool, names = job
        found = run_selftest("61", [program, "--tool", tool, "--error-exitcode", "9"], names, SANITIZER_SECONDS)
        print(f"{tool} {', '.join(names)}: {found['state']}", file=sys.stderr)
        return {"tool": tool, "cases": ", ".join(names)} | {
            key: found[key] for key in ("state", "seconds", "sanitizer", "error") if key in found
        }

    with ThreadPoolExecutor(SANITIZER_PROCESSES) as pool:
        checks = list(pool.map(check, jobs))
    unclean = sum(found["state"] != "clean" for found in checks)
    return {"state": "clean" if not unclean else f"{unclean} of {len(checks)} groups are not clean", "groups": checks}


def run_products(*, quick: bool) -> list[dict]:
    """Return the times of every shape at every width, and of two prefill sizes."""
    device = torch.device("cuda", 0)
    rows = []
    for name in measure.SHAPES:
        for n in (*measure.WIDTHS, *(() if quick else (512,))):
            result = measure.product(name, n, device, with_torch=n in (1, 8, 512) and not name.startswith("tall "))
            rows.append(asdict(result) | {"bandwidth": result.bandwidth})
            print(f"{name} n={n}: {result.cold_us:.1f} us", file=sys.stderr)
        torch.cuda.empty_cache()
    return rows


def run_attention() -> list[dict]:
    """Measure decode at several batch sizes and lengths, and prefill."""
    device = torch.device("cuda", 0)
    cases = [
        ("decode", kv, n, length) for kv in ("F16", "E5M2", "INT8") for n, length in ((1, 4096), (4, 4096), (8, 1024))
    ]
    cases += [("prefill", "F16", 1, 2048), ("prefill", "INT8", 1, 2048)]
    return [asdict(measure.attention(*case, device)) for case in cases]


def run_rates() -> dict:
    """Measure what the card does per clock, and how fast it reads."""
    device = torch.device("cuda", 0)
    return {
        "stream_bandwidth": measure.stream_bandwidth(device),
        "lanes_per_clock_and_multiprocessor": {p: measure.instructions_per_clock(p, device) for p in measure.PROBES},
    }


def run_program(name: str, *arguments: str | Path, seconds: int = ENGINE_SECONDS) -> dict:
    """Run a program beside this one, which writes a JSON file; return its content, and how the program ended."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments), "--json", str(result)]
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
            state = "clean" if done.returncode == 0 else f"exit code {done.returncode}"
            last = "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
        except subprocess.TimeoutExpired:
            state, last = f"not finished in {seconds} s", ""
        facts = json.loads(result.read_text()) if result.is_file() else {}
    print(f"{name} {' '.join(map(str, arguments))}: {state}", file=sys.stderr)
    return {"state": state, "seconds": round(time.monotonic() - start, 1), **({"last": last} if last else {}), **facts}


class Files:
    """The models of a run, each made at its first use."""

    def __init__(self, folder: Path, model: Path | None) -> None:
        self._folder = folder
        self.model = model
        """A real model, if there is one."""

    def requantized(self, model: Path, name: str) -> Path:
        """Return a copy of a model in the types of REQUANTIZED."""
        from requantize import requantize

        path = self._folder / f"{model.stem}.{name}.gguf"
        if not path.exists():
            requantize(model, path, REQUANTIZED[name])
        return path

    def shaped(self, shape: str, mixture: str) -> Path:
        """Return random weights in the shape of a known model, or of a small one (`tiny-` and its architecture)."""
        sys.path.insert(0, str(ROOT / "tests"))
        from support import models

        path = self._folder / f"{shape}.{mixture}.gguf"
        if not path.exists():
            small = {"hidden_size": 512, "intermediate_size": 1024, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
            known = models.SHAPES.get(shape) or models.tiny(shape.removeprefix("tiny-"), **small)
            models.write_gguf(path, known, mixture)
        return path


def run_numerics(files: Files) -> dict:
    """Compare each model with float32, and the real one also with settings that are lossy by choice."""
    found = {}
    if files.model is not None:
        found[files.model.name] = run_program("numerics.py", files.model, "--device", "cuda")
        for name in REQUANTIZED:
            path = files.requantized(files.model, name)
            found[path.name] = run_program("numerics.py", path, "--device", "cuda", "--tokens", "1024")
        # Records, not checks: 8 bits are lossy, each in its way, and none of them is what serves unless asked for.
        for name, flags in LOSSY.items():
            lossy = run_program("numerics.py", files.model, "--device", "cuda", *flags)
            found[f"{files.model.name}, {name}"] = lossy | {"outcome": lossy["state"], "state": "clean"}
    for mixture in RANDOM_TYPES:
        path = files.shaped("tiny-qwen3", mixture)
        found[path.name] = run_program("numerics.py", path, "--device", "cuda", "--tokens", "1024")
    return found


def run_engine(files: Files) -> dict:
    """Measure speed and memory in SGLang, in 8 GB; the first model also without our kernels, in the whole memory."""
    plain = ["--context-length", "4400", "--mem-fraction-static", "0.3"]
    small = ["--memory-gib", str(MEMORY_GIB), "--max-total-tokens", "17000", "--kv-cache-dtype", "int8"]
    found = {}
    for shape, mixture in SHAPES.items():
        path = files.shaped(shape, mixture)
        found[f"{path.name}, in {MEMORY_GIB} GiB, KV int8"] = run_program("engine_speed.py", path, *plain, *small)
    path = files.shaped(*next(iter(SHAPES.items())))
    free = [*plain, "--max-total-tokens", "8192"]
    found[f"{path.name}, our kernels"] = run_program("engine_speed.py", path, *free)
    found[f"{path.name}, torch only"] = run_program("engine_speed.py", path, *free, "--torch-only")
    return found


def run_serve(files: Files) -> dict:
    """Run `pascaline serve` in 8 GB."""
    paths = [*([files.model] if files.model else []), *(files.shaped(*item) for item in SHAPES.items())]
    return {path.name: run_program("serve_in_8_gb.py", path) for path in paths}


def run_servers(files: Files) -> dict:
    """Measure both engines on one file; `pascaline bench batch` starts and loads each."""
    path = files.shaped(*next(iter(SHAPES.items())))
    engines = {"sglang": sys.executable, "llama.cpp": shutil.which("llama-server")}
    return {
        f"{engine}, {path.name}": bench_batch(path, engine) if program else {"left out": "llama-server is not on PATH"}
        for engine, program in engines.items()
    }


def bench_batch(path: Path, engine: str) -> dict:
    """Return what `pascaline bench batch` measures of a file in an engine, with 95 % intervals."""
    command = [sys.executable, "-m", "pascaline", "bench", "batch", "--json", "--engine", engine, "--model", str(path)]
    with tempfile.TemporaryDirectory() as scratch:
        command += ["--output", scratch, *BENCH_FLAGS]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ENGINE_SECONDS)
        except subprocess.TimeoutExpired:
            return {"state": f"not finished in {ENGINE_SECONDS} s"}
    if done.returncode:
        return {"state": f"exit code {done.returncode}", "last": done.stderr[-3000:]}
    print(f"bench batch, {engine}: clean", file=sys.stderr)
    document = json.loads(done.stdout)
    version = document["instance"]["server"]["engine_version"]
    return {"state": "clean", "engine_version": version} | {
        point["name"]: {figure: point["summary"][figure] for figure in BENCH_FIGURES} for point in document["points"]
    }


def run_tests() -> dict:
    """Return pytest's result for the tests that are marked gpu."""
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "sglang-pascal/tests"],
            cwd=ROOT / "python",
            capture_output=True,
            text=True,
            check=False,
            timeout=TESTS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"state": f"not finished in {TESTS_SECONDS} s"}
    state = "clean" if done.returncode == 0 else f"exit code {done.returncode}"
    return {"state": state, "last": done.stdout[-4000:]}


def read_ggml(path: Path) -> dict[tuple[str, int, int, int], float]:
    """Return (type, rows, columns, n) -> microseconds, from ggml's own performance test."""
    pattern = r"MUL_MAT\(type_a=(\w+),type_b=f32,m=(\d+),n=(\d+),k=(\d+),.*?([0-9.]+) us/run"
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text())
    return {(t.upper(), int(m), int(k), int(n)): float(us) for t, m, n, k, us in re.findall(pattern, text)}


def add_ggml(products: list[dict], times: dict[tuple[str, int, int, int], float], bandwidth: float) -> None:
    """Add each product's time in ggml, and our share of it: both include quantising x, both are hot.

    bandwidth: bytes per second of a plain read. Beside our share is that of reading the weights once, which no program
    can beat unless its weights stay in the L2 cache.
    """
    for row in products:
        us = times.get((row["tensor_type"], row["rows"], row["columns"], row["n"]))
        if us is not None:
            aim = AIMS.get(row["tensor_type"], AIMS["other"]).get(row["n"])
            share, floor = row["hot_us"] / us, row["weight_bytes"] / bandwidth * 1e6 / us
            row |= {"ggml_us": us, "share_of_ggml": share, "memory_share_of_ggml": floor, "aim": aim}
            if aim is not None:
                row["aim_is"] = "met" if share <= aim else "below what memory allows" if floor > aim else "missed"


def read_ggml_attention(path: Path) -> dict[tuple[int, int, int], float]:
    """Return (sequences, positions, new tokens of each) -> microseconds, for float16 KV with Llama-3.1-8B's heads."""
    pattern = r"FLASH_ATTN_EXT\(hsk=128,hsv=128,nh=8,nr23=\[4,(\d+)\],kv=(\d+),nb=(\d+),.*?([0-9.]+) us/run"
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text())
    lines = [line for line in text.splitlines() if re.search(r"type_K\w*=f16", line) and "logit_softcap=0.0" in line]
    found = [match.groups() for line in lines if (match := re.search(pattern, line))]
    return {(int(n), int(length), int(new)): float(us) for n, length, new, us in found}


def add_ggml_attention(rows: list[dict], times: dict[tuple[int, int, int], float]) -> None:
    """Add each attention's time in ggml, if its test has the case."""
    for row in rows:
        new = 1 if row["phase"] == "decode" else row["length"]
        us = times.get((row["sequences"], row["length"], new))
        if us is not None and row["kv_type"] == "F16":
            row |= {"ggml_us": us, "share_of_ggml": row["ours_us"] / us}


def steps(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Callable[[], object]]]:
    """Return part -> name in the report -> function that computes it."""
    files = Files(scratch, args.model)
    return {
        "rates": {"rates": run_rates},
        "selftest": {f"selftest sm_{arch}": functools.partial(run_selftest, arch) for arch in ("61", "60")},
        "products": {"products": lambda: run_products(quick=args.quick)},
        "attention": {"attention": run_attention},
        "engine": {"engine": lambda: run_engine(files)},
        "serve": {"serve": lambda: run_serve(files)},
        "servers": {"servers": lambda: run_servers(files)},
        "numerics": {"numerics": lambda: run_numerics(files)},
        "sanitizer": {"sanitizer": run_sanitizer},
        "tests": {"tests": run_tests},
    }


def unclean(report: dict) -> list[str]:
    """Return the names of the checks in a report that are present but not clean."""
    states = {}
    for name, part in report.items():
        if isinstance(part, dict) and "state" in part:
            states[name] = part["state"]
        elif isinstance(part, dict):
            states |= {f"{name}: {key}": value["state"] for key, value in part.items() if _has_state(value)}
    return [name for name, state in states.items() if state != "clean"]


def _has_state(value: object) -> bool:
    return isinstance(value, dict) and "state" in value


def earlier(path: Path, place: dict) -> dict:
    """Return the existing report if it is for this card and driver."""
    if not path.is_file():
        return {}
    report: dict = json.loads(path.read_text())
    same = all(report.get("environment", {}).get(key) == place[key] for key in ("card", "driver", "torch"))
    return report if same else {}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUT_DIR", type=Path)
    parser.add_argument("--parts", metavar="NAME", nargs="+", help="only these; default: all")
    parser.add_argument("--model", metavar="FILE.gguf", type=Path, help="a real model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--ggml", metavar="FILE", type=Path, help="output of ggml's performance test on this card")
    parser.add_argument("--quick", action="store_true", help="no prefill products")
    args = parser.parse_args()
    known = steps(args, Path())
    for name in args.parts or []:
        if name not in known:
            parser.error(f"--parts: unknown part {name!r}, must be of: {', '.join(known)}")
    for option, path in (("--model", args.model), ("--ggml", args.ggml)):
        if path is not None and not path.is_file():
            parser.error(f"{option}: there is no file {path}")
    return args


def main() -> int:
    """Run the parts and write the files after each; return 1 if a check is not clean."""
    args = parse()
    if not torch.cuda.is_available():
        sys.stderr.write("gpu_report: error: no NVIDIA GPU is visible; run it where nvidia-smi lists one\n")
        return 6
    place = environment()
    args.folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", place["card"].lower())
    target = args.folder / f"kernels-{slug}.json"
    report = earlier(target, place) | {"environment": place}
    dates = report.setdefault("dates", {})
    with tempfile.TemporaryDirectory() as scratch:
        for part, computed in steps(args, Path(scratch)).items():
            if args.parts and part not in args.parts:
                continue
            for name, step in computed.items():
                print(name, file=sys.stderr)
                report[name] = step()
                dates[name] = now()
            if "products" in report and "rates" in report and args.ggml:
                add_ggml(report["products"], read_ggml(args.ggml), report["rates"]["stream_bandwidth"])
            if "attention" in report and args.ggml:
                add_ggml_attention(report["attention"], read_ggml_attention(args.ggml))
            target.write_text(json.dumps(report, indent=1) + "\n")
            target.with_suffix(".html").write_text(as_html(report))
    if bad := unclean(report):
        print("not clean: " + "; ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
