"""One report of the kernels on the GPU at hand: correctness, memory checks, speed; one JSON and one HTML file.

    python benchmarks/gpu_report.py OUT_DIR [--ggml FILE] [--quick]

Parts, each of which says so if it could not run:
  selftest    every operation against its reference, with the code for sm_61 and with that for sm_60
  sanitizer   compute-sanitizer memcheck and racecheck over the selftest, where the program is installed
  products    decode and prefill products of three models' layers: microseconds, bandwidth, torch, and ggml
  attention   decode and prefill, against torch's scaled_dot_product_attention
  rates       instructions per clock and multiprocessor, bandwidth of a plain read

--ggml: what `test-backend-ops perf -o MUL_MAT` of ggml printed on the same card (build it there from its source, with
the shapes of `sglang_pascal.measure.SHAPES` as test cases). No figure of this report is one of a Pascal card unless the
card's name says so.
"""

from __future__ import annotations

import argparse
import datetime
import html
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from sglang_pascal import measure

AIMS = {"Q4_K": {1: 0.45, 2: 0.38, 4: 0.30, 8: 0.22}, "other": {1: 0.5, 2: 0.45, 4: 0.35, 8: 0.3}}
"""Share of ggml's time that is aimed at, by number of rows of x."""
SANITIZER_CASES = ["matmul", "repack", "dequantize", "quantize", "silu", "rms_norm", "NaN", "argmax", "top_k", "rope"]
SANITIZER_CASES += ["attention_decode", "attention_prefill"]
"""All but the CUDA graph, whose kernels are the same."""
LIMIT_SECONDS = 240
"""Of a selftest, with or without the sanitizer."""


def environment() -> dict:
    """The card, the driver and what else decides the figures."""
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
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run_selftest(architecture: str, prefix: list[str] | None = None, names: list[str] | None = None) -> dict:
    """The selftest in a process of its own: its outcomes, and what a sanitizer said."""
    command = [*(prefix or []), sys.executable, "-m", "sglang_pascal", "selftest", "--json", *(names or [])]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
            env=os.environ | {"SGLANG_PASCAL_ARCHITECTURE": architecture},
        )
    except subprocess.TimeoutExpired:
        return {"state": f"not finished in {LIMIT_SECONDS} s"}
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


def run_sanitizer() -> dict:
    """memcheck and racecheck over all operations."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"state": "compute-sanitizer is not installed"}
    tools = {tool: [program, "--tool", tool, "--error-exitcode", "9"] for tool in ("memcheck", "racecheck")}
    return {tool: run_selftest("61", prefix, SANITIZER_CASES) for tool, prefix in tools.items()}


def run_products(*, quick: bool) -> list[dict]:
    """Times of every shape at every width, and of two prefill sizes."""
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
    """Decode at several batch sizes and lengths; prefill."""
    device = torch.device("cuda", 0)
    cases = [
        ("decode", kv, n, length) for kv in ("F16", "E5M2", "INT8") for n, length in ((1, 4096), (4, 4096), (8, 1024))
    ]
    cases += [("prefill", "F16", 1, 2048), ("prefill", "INT8", 1, 2048)]
    return [asdict(measure.attention(*case, device)) for case in cases]


def run_rates() -> dict:
    """What the card does per clock, and how fast it reads."""
    device = torch.device("cuda", 0)
    return {
        "stream_bandwidth": measure.stream_bandwidth(device),
        "lanes_per_clock_and_multiprocessor": {p: measure.instructions_per_clock(p, device) for p in measure.PROBES},
    }


def read_ggml(path: Path) -> dict[tuple[str, int, int, int], float]:
    """(type, rows, columns, n) -> microseconds, from ggml's own performance test."""
    pattern = r"MUL_MAT\(type_a=(\w+),type_b=f32,m=(\d+),n=(\d+),k=(\d+),.*?([0-9.]+) us/run"
    text = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text())
    return {(t.upper(), int(m), int(k), int(n)): float(us) for t, m, n, k, us in re.findall(pattern, text)}


def add_ggml(products: list[dict], times: dict[tuple[str, int, int, int], float]) -> None:
    """Each product's time in ggml, and our share of it: both with the quantising of x, both hot."""
    for row in products:
        us = times.get((row["tensor_type"], row["rows"], row["columns"], row["n"]))
        if us is not None:
            aim = AIMS.get(row["tensor_type"], AIMS["other"]).get(row["n"])
            row |= {"ggml_us": us, "share_of_ggml": row["hot_us"] / us, "aim": aim}


def as_html(report: dict) -> str:
    """One page without scripts or outside parts."""
    place = report["environment"]
    parts = [
        f"<h1>Kernels on {html.escape(place['card'])}</h1>",
        f"<p>Driver {html.escape(place['driver'])}, torch {html.escape(place['torch'])}, {html.escape(place['date'])}. "
        "The kernels are compiled for Pascal; a newer card runs their PTX. Its times say nothing of a Pascal card.</p>",
    ]
    for name, value in report.items():
        parts += [f"<h2>{html.escape(name)}</h2>", _html_of(value)]
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:3px}"
    )
    return f"<!doctype html><meta charset=utf-8><title>GPU report</title><style>{style}</style>" + "\n".join(parts)


def _html_of(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        keys = list(dict.fromkeys(key for row in value for key in row))
        head = "".join(f"<th>{html.escape(key)}</th>" for key in keys)
        body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in keys) + "</tr>" for row in value)
        return f"<table><tr>{head}</tr>{body}</table>"
    if isinstance(value, dict):
        rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{_html_of(v)}</td></tr>" for k, v in value.items())
        return f"<table>{rows}</table>"
    return _cell(value)


def _cell(value: object) -> str:
    return "" if value is None else html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def main() -> int:
    """Run all parts and write the files; exit code 1 if an operation is wrong or a check not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="OUT_DIR", type=Path)
    parser.add_argument("--ggml", metavar="FILE", type=Path, help="output of ggml's performance test on this card")
    parser.add_argument("--quick", action="store_true", help="no prefill products")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("gpu_report: error: no NVIDIA GPU is visible; run it where nvidia-smi lists one\n")
        return 6
    report: dict = {"environment": environment()}
    args.folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", report["environment"]["card"].lower())
    steps = {
        "rates": run_rates,
        "selftest sm_61": lambda: run_selftest("61"),
        "selftest sm_60": lambda: run_selftest("60"),
        "products": lambda: run_products(quick=args.quick),
        "attention": run_attention,
        "sanitizer": run_sanitizer,
    }
    for name, step in steps.items():
        print(name, file=sys.stderr)
        report[name] = step()
        if name == "products" and args.ggml:
            add_ggml(report["products"], read_ggml(args.ggml))
        (args.folder / f"kernels-{slug}.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.folder / f"kernels-{slug}.html").write_text(as_html(report))
    checks = [report["selftest sm_61"], report["selftest sm_60"], *report["sanitizer"].values()]
    return (
        0 if all(check == "clean" or (isinstance(check, dict) and check["state"] == "clean") for check in checks) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
