"""For owners of a Tesla P4, P40, P100 or GTX 10xx who want to send us real numbers. Any other NVIDIA GPU works too.

    python benchmarks/first_hour_on_pascal.py [FILE.json] [--model MODEL.gguf] [--parts rates products] [--sustained 60]

It takes under fifteen minutes, needs no root and sends nothing: attach the file that it writes to an issue. The file
holds the card's name, driver, clocks, temperatures and times, but no host name or serial number. It needs torch,
sglang-pascal (with built kernels, or the extra `kernels`) and 4 GB of free device memory. The order puts the most
important parts first, in case it is stopped:

  1. bandwidth of a plain read
  2. instructions per clock: above all what a 16-byte shared load of one address costs, 1 clock or 4, and how much
     slower loops of 33 and 49 KB of code run than one that fits any instruction cache
  3. every operation against its reference
  4. products as they are served, of Llama-3.1-8B's largest Q4_K and Q6_K matrices: both widths, 1 to 128 rows of x
     and 512
  5. attention at 512, 4096 and 16384 positions: decode of one and four sequences, and 512 new tokens
  6. a minute of a prompt's products, with the clocks, power and speed every five seconds
  7. torch's own operations that serving calls, with the CPU's results
  8. products of float16 by cuBLAS: their speed, and which kernels it chooses
  9. with --model, and llama-bench on PATH: its speed with that file
with the clocks, power and temperature before and after each part. At the end it says in words which assumptions of
docs/kernels.md held. Exit codes: 0 done, 1 an operation gave a wrong result, 6 no GPU, 7 too little free memory,
8 something is not installed, 9 the file cannot be written.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable


def fail(code: int, message: str) -> NoReturn:
    """Print one line on standard error and end with the exit code."""
    sys.stderr.write(f"first_hour_on_pascal: error: {message}\n")
    sys.exit(code)


try:
    import torch
    from sglang_pascal import measure, selftest
except ImportError as exc:
    fail(8, f"{exc}; install torch and sglang-pascal as python/sglang-pascal/README.md says, or run ./dev sync")

NAMES = ("Llama-3.1-8B gate+up", "Llama-3.1-8B down")
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 16, 17, 20, 24, 25, 32, 33, 40, 48, 64, 65, 96, 128, 512)
LENGTHS = (512, 4096, 16384)
SUSTAINED = ("Llama-3.1-8B gate+up", 512, 8)
"""Shape, rows of x and bits of the minute of work."""
SUSTAINED_SECONDS, WINDOW_SECONDS = 60, 5
CUBLAS_ROWS = (17, 128, 512)
"""Rows of x: fewer never reach cuBLAS (docs/kernels.md)."""
CHOICES, VOCABULARY, TOLERANCE = 8, 32064, 1e-4
"""Rows and columns of the logits that torch's operations get; the relative error that float32 may have."""
BENCH_SECONDS = 120
"""Time limit of llama-bench."""
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"
PASCAL = 6
"""Major compute capability."""
JOBS = 12
"""Most processes of the selftest."""
LIMIT_SECONDS = 13 * 60
"""After this time no further measurement starts."""
NEEDED_BYTES = 4 * 10**9
DEADLINE = time.monotonic() + LIMIT_SECONDS


def card_state() -> dict[str, str]:
    """Return what nvidia-smi reports about the first visible card now; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))


def rates(device: torch.device) -> dict:
    """Measure bandwidth and instructions."""
    return {
        "read_bytes_per_second": measure.stream_bandwidth(device),
        "lanes_per_clock_and_multiprocessor": {
            # sm_60 has no dp4a, so there is no kernel for it.
            name: measure.instructions_per_clock(name, device)
            for name in measure.PROBES
            if name != "dp4a" or torch.cuda.get_device_capability(device) != (6, 0)
        },
    }


def correctness(device: torch.device) -> list[dict]:
    """Run all cases of the selftest; in several processes on a newer card, whose driver compiles every kernel first."""
    is_pascal = torch.cuda.get_device_capability(device)[0] == PASCAL
    jobs = 1 if is_pascal else min(JOBS, len(os.sched_getaffinity(0)))
    return [asdict(outcome) | {"passed": outcome.passed} for outcome in selftest.run(device, jobs=jobs)]


def products(device: torch.device) -> list[dict]:
    """Measure both matrices at each number of rows and width while there is time, the few rows of decoding first."""
    return [
        asdict(measure.product(name, n, device, bits=bits, with_torch=False))
        for n, bits, name in itertools.product(ROWS, (16, 8), NAMES)
        if is_time_left()
    ]


def attention(device: torch.device) -> list[dict]:
    """Measure decode of one and four sequences, and 512 new tokens of one, with float16 and int8 KV."""
    cases = [("decode", kind, n, length) for length in LENGTHS for kind in ("F16", "INT8") for n in (1, 4)]
    cases += [("prefill", kind, 1, length) for length in LENGTHS for kind in ("F16", "INT8")]
    return [
        asdict(measure.attention(*case, device, new=min(512, case[3]), with_torch=False))
        for case in cases
        if is_time_left()
    ]


def sustained(device: torch.device, length: float = SUSTAINED_SECONDS) -> list[dict]:
    """Multiply for a number of seconds. Return the speed and the card's state in each window."""
    name, n, bits = SUSTAINED
    _, rows, columns = measure.SHAPES[name]
    work = measure.repeated_product(name, n, bits, device)
    begin, windows = time.monotonic(), []
    while time.monotonic() < begin + length:
        start, calls = time.monotonic(), 0
        while time.monotonic() < start + WINDOW_SECONDS:
            work()
            torch.cuda.synchronize(device)
            calls += 1
        seconds = time.monotonic() - start
        windows.append({"macs_per_second": calls * n * rows * columns / seconds, **card_state()})
    return windows


TORCH_OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "argmax": lambda x, _: x.argmax(-1),
    "sort": lambda x, _: x.sort(-1, descending=True).values,
    "topk": lambda x, _: x.topk(20).values,
    "softmax": lambda x, _: x.softmax(-1),
    "log_softmax": lambda x, _: x.log_softmax(-1),
    "logsumexp": lambda x, _: x.logsumexp(-1),
    "cumsum": lambda x, _: x.softmax(-1).cumsum(-1),
    "multinomial": lambda x, _: torch.multinomial((x == x.amax(-1, keepdim=True)).float(), 1),
    "mean of squares": lambda x, _: x.pow(2).mean(-1),
    "float16": lambda x, _: (x.half() * 0.75).float(),
    "silu": lambda x, _: torch.nn.functional.silu(x),
    "where": lambda x, _: torch.where(x > 0, x, -torch.inf),
    "masked_fill": lambda x, _: x.masked_fill(x < 0, 0),
    "nonzero": lambda x, _: (x > 3).nonzero(),
    "index_select": lambda x, rows: x.index_select(0, rows),
    "gather": lambda x, rows: x.gather(-1, rows.expand(CHOICES, -1)),
    "scatter": lambda x, rows: x.scatter(-1, torch.arange(len(rows), device=x.device).expand(CHOICES, -1), 2.0),
    "embedding": lambda x, rows: torch.nn.functional.embedding(rows, x),
    "cat": lambda x, _: torch.cat([x, 2 * x], -1),
}


def torch_operations(device: torch.device) -> list[dict]:
    """Compare torch's own operations with the CPU: whole numbers must be equal, others within TOLERANCE."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(CHOICES, VOCABULARY, generator=random)
    rows = torch.randint(CHOICES, (64,), generator=random)
    return [
        _compared(name, operation(logits, rows), operation(logits.to(device), rows.to(device)).cpu())
        for name, operation in TORCH_OPERATIONS.items()
    ]


def _compared(name: str, expected: torch.Tensor, found: torch.Tensor) -> dict:
    if expected.shape != found.shape:
        return {"name": name, "passed": False, "shape": list(found.shape), "expected_shape": list(expected.shape)}
    is_exact = not expected.is_floating_point()
    passed = torch.equal(expected, found) if is_exact else torch.allclose(found, expected, rtol=TOLERANCE, atol=1e-7)
    differs = expected != found
    error = (expected[differs].double() - found[differs].double()).abs().max().item() if differs.any() else 0.0
    return {"name": name, "passed": passed, "largest_error": error}


def cublas(device: torch.device) -> list[dict]:
    """Measure float16 products of CUBLAS_ROWS rows with the largest matrix, and name the kernels."""
    _, rows, columns = measure.SHAPES[NAMES[0]]
    weight = torch.randn(rows, columns, device=device, dtype=torch.float16)
    return [_cublas_product(torch.randn(n, columns, device=device, dtype=torch.float16), weight) for n in CUBLAS_ROWS]


def _cublas_product(x: torch.Tensor, weight: torch.Tensor) -> dict:
    microseconds = measure.median_us([lambda: x @ weight.T], 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        x @ weight.T
        torch.cuda.synchronize(x.device)
    kernels = {event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    speed = len(x) * weight.numel() / microseconds * 1e6
    return {"n": len(x), "us": microseconds, "macs_per_second": speed, "kernels": sorted(kernels)}


def llama_bench(_: torch.device, model: Path | None) -> dict:
    """Run llama-bench for a prompt of 512 tokens and 32 tokens of an answer."""
    program = shutil.which("llama-bench")
    if program is None or model is None:
        return {"left out": "llama-bench is not on PATH" if program is None else "no --model was given"}
    command = [program, "-m", str(model), "-ngl", "99", "-p", "512", "-n", "32", "-r", "2", "-fa", "0,1", "-o", "json"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=BENCH_SECONDS, check=True).stdout
    kept = ("build_commit", "flash_attn", "n_prompt", "n_gen", "avg_ts", "stddev_ts")
    return {"rows": [{key: row[key] for key in kept if key in row} for row in json.loads(text[text.index("[") :])]}


def findings(parts: dict[str, dict]) -> list[str]:
    """Return in words which assumptions of docs/kernels.md held; of the parts that ran to their end."""
    results = {name: part.get("result") for name, part in parts.items()}
    found: list[str] = []
    if isinstance(rates := results.get("rates"), dict) and "lanes_per_clock_and_multiprocessor" in rates:
        found += _about_instructions(rates["lanes_per_clock_and_multiprocessor"])
    if isinstance(rows := results.get("products"), list) and rows:
        found += _about_products(rows)
    if isinstance(rows := results.get("attention"), list) and rows and isinstance(rates, dict):
        found += _about_attention(rows, rates.get("read_bytes_per_second"))
    if isinstance(windows := results.get("sustained"), list) and windows:
        found.append(_about_clocks(windows))
    if isinstance(cases := results.get("torch"), list) and cases:
        found.append(_about_torch(cases))
    if isinstance(rows := results.get("cublas"), list):
        found += [_about_cublas(row) for row in rows]
    if isinstance(bench := results.get("llama-bench"), dict) and bench.get("rows"):
        found.append(_about_llama_bench(bench["rows"]))
    return found


def _about_instructions(lanes: dict[str, float]) -> list[str]:
    clocks = 32 / lanes["shared_broadcast"]
    held = (
        "held: the kernels are made for 4"
        if clocks > LOAD_LIMIT
        else "did not hold: kernels with fewer rows a lane may be faster"
    )
    found = [f"A 16-byte shared load of one address takes {clocks:.1f} clocks; that {held}."]
    if "dp4a" in lanes:
        share = lanes["dp4a"] / PASCAL_LANES
        found.append(
            f"dp4a: {lanes['dp4a']:.0f} a clock and multiprocessor, "
            f"{share:.0%} of what Pascal's should be ({PASCAL_LANES})."
        )
    for probe in ("code_33k", "code_49k"):
        if probe in lanes and "code_11k" in lanes:
            share = lanes[probe] / lanes["code_11k"]
            fits = (
                "the instruction cache does not slow such loops"
                if share > FAST_ENOUGH
                else "such loops wait for instructions"
            )
            found.append(
                f"A loop of {probe[5:-1]} KB of code runs at {share:.0%} of the speed of one of 11 KB: {fits}."
            )
    return found


def _about_products(rows: list[dict]) -> list[str]:
    """Where a row more costs the others, and up to how many rows memory decides."""
    found = []
    for bits in (16, 8):
        times = {row["n"]: row["cold_us"] for row in rows if row["bits"] == bits and row["name"] == NAMES[0]}
        if 1 not in times:
            continue
        free = max(n for n, us in times.items() if us <= MEMORY_DECIDES * times[1])
        falls = [
            f"{before} to {after} ({1 - after / times[after] * times[before] / before:.0%})"
            for before, after in itertools.pairwise(sorted(times))
            if after / times[after] < FAST_ENOUGH * before / times[before]
        ]
        found.append(
            f"Products of {bits} bits take at most a fifth longer than one row's up to {free} rows; "
            f"throughput falls {'nowhere' if not falls else 'from ' + ', '.join(falls)}."
        )
    return found


def _about_attention(rows: list[dict], read: float | None) -> list[str]:
    """Return how near the longest decode steps come to reading keys and values once."""
    longest = max((row["length"] for row in rows if row["phase"] == "decode"), default=0)
    return [
        f"Attention of {row['sequences']} at {longest} positions ({row['kv_type']}) reads keys and values at "
        f"{row['kv_bytes'] / row['ours_us'] * 1e6 / read:.0%} of the plain read."
        for row in rows
        if read and row["phase"] == "decode" and row["length"] == longest
    ]


def _about_clocks(windows: list[dict]) -> str:
    first, last = windows[0]["macs_per_second"], windows[-1]["macs_per_second"]
    clock, power = (windows[-1].get(name, "unknown") for name in ("clocks.sm", "power.draw"))
    return (
        f"After {len(windows) * WINDOW_SECONDS} s of a prompt's products the speed is {last / first:.0%} of that of "
        f"the first {WINDOW_SECONDS} s, at a clock of {clock} and {power}."
    )


def _about_llama_bench(rows: list[dict]) -> str:
    """Return llama.cpp's best of its settings; `benchmarks/race.py` runs this engine beside it."""
    prompts = max((row["avg_ts"] for row in rows if row.get("n_prompt") and not row.get("n_gen")), default=0.0)
    answers = max((row["avg_ts"] for row in rows if row.get("n_gen") and not row.get("n_prompt")), default=0.0)
    return (
        f"llama-bench reads a prompt at {prompts:.0f} tok/s and writes an answer at {answers:.1f}; "
        "benchmarks/race.py compares this engine with it."
    )


def _about_torch(cases: list[dict]) -> str:
    wrong = [case["name"] for case in cases if not case["passed"]]
    return f"torch's own operations: {len(cases) - len(wrong)} of {len(cases)} give the CPU's results" + (
        f"; wrong: {', '.join(wrong)}." if wrong else "."
    )


def _about_cublas(row: dict) -> str:
    kernels = ", ".join(row["kernels"]) or "kernels that CUPTI did not name"
    return f"A float16 product of {row['n']} rows: {row['macs_per_second'] / 1e12:.2f} T MAC/s, by {kernels}."


LOAD_LIMIT = 2.5
"""Clocks: nearer to 4 than to 1."""
PASCAL_LANES = 128
FAST_ENOUGH = 0.97
MEMORY_DECIDES = 1.2


def is_time_left() -> bool:
    """Whether another measurement may start."""
    return time.monotonic() < DEADLINE


PARTS: dict[str, Callable[[torch.device], object]] = {
    "rates": rates,
    "correctness": correctness,
    "products": products,
    "attention": attention,
    "sustained": sustained,
    "torch": torch_operations,
    "cublas": cublas,
}
NAMES_OF_PARTS = (*PARTS, "llama-bench")


def check(path: Path) -> torch.device:
    """Return the device; end the program if nothing can be measured or written."""
    if not torch.cuda.is_available():
        fail(6, "no NVIDIA GPU is visible; run it where nvidia-smi lists one")
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    if free < NEEDED_BYTES:
        fail(
            7,
            f"{free / 1e9:.1f} GB of device memory are free, must be {NEEDED_BYTES / 1e9:.0f}; stop what uses the card",
        )
    try:
        path.touch()
    except OSError as exc:
        fail(9, f"cannot write {path}: {exc.strerror}; name a file in a folder that you may write")
    return device


def main() -> int:
    """Run the parts; write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.json", nargs="?", type=Path, default=Path("pascal-report.json"))
    parser.add_argument("--model", metavar="MODEL.gguf", type=Path, help="what llama-bench measures, if it is on PATH")
    parser.add_argument(
        "--parts", metavar="NAME", nargs="+", choices=NAMES_OF_PARTS, help=f"of {', '.join(NAMES_OF_PARTS)}"
    )
    parser.add_argument(
        "--sustained", metavar="SECONDS", type=float, default=SUSTAINED_SECONDS, help="default: %(default)s"
    )
    args = parser.parse_args()
    path: Path = args.file
    device = check(path)
    report: dict = {
        "card": torch.cuda.get_device_name(device),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parts": {},
    }
    parts = PARTS | {
        "sustained": functools.partial(sustained, length=args.sustained),
        "llama-bench": functools.partial(llama_bench, model=args.model),
    }
    for name, part in parts.items():
        if args.parts and name not in args.parts:
            continue
        if not is_time_left():
            report["parts"][name] = {"skipped": f"more than {LIMIT_SECONDS} s had passed"}
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        before = card_state()
        try:
            result = part(device)
        except Exception as exc:  # a part that fails is a finding: the others still run
            result = {"failed": f"{type(exc).__name__}: {exc}"}
        report["parts"][name] = {"before": before, "result": result, "after": card_state()}
        path.write_text(json.dumps(report, indent=1) + "\n")
    report["findings"] = findings(report["parts"])
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(report["findings"]), file=sys.stderr)
    if "correctness" not in report["parts"]:
        print(f"{path}: without correctness", file=sys.stderr)
        return 0
    checked = [report["parts"][name].get("result") for name in ("correctness", "torch") if name in report["parts"]]
    right = all(isinstance(cases, list) and all(case["passed"] for case in cases) for cases in checked)
    print(
        f"{path}: please attach it to an issue" + ("" if right else "; an operation gave a wrong result"),
        file=sys.stderr,
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
