"""For owners of a Tesla P4, P40, P100 or GTX 10xx who want to send us real numbers. Any other NVIDIA GPU works too.

    python benchmarks/first_hour_on_pascal.py [FILE.json]

It takes under ten minutes, needs no root and sends nothing: attach the file that it writes to an issue. The file holds
the card's name, driver, clocks, temperatures and times, but no host name or serial number. It needs torch,
sglang-pascal (with built kernels, or the extra `kernels`) and 4 GB of free device memory. The order puts the most
important parts first, in case it is stopped:

  1. bandwidth of a plain read
  2. instructions per clock: above all what a 16-byte shared load of one address costs, 1 clock or 4
  3. every operation against its reference
  4. decode products of Llama-3.1-8B's layers for 1, 4, 8 and 16 rows, prefill products for 512
  5. attention over 1024 positions
with the clocks, power and temperature before and after each part. Exit codes: 0 done, 1 an operation gave a wrong
result, 6 no GPU, 7 too little free memory, 8 something is not installed, 9 the file cannot be written.
"""

from __future__ import annotations

import argparse
import datetime
import json
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

NAMES = [name for name in measure.SHAPES if name.startswith("Llama-3.1-8B")]
ROWS = (1, 4, 8, 16, 512)
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"
LIMIT_SECONDS = 9 * 60
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
    """Run all cases of the selftest."""
    return [asdict(outcome) | {"passed": outcome.passed} for outcome in selftest.run(device)]


def products(device: torch.device) -> list[dict]:
    """Measure each layer at each number of rows while there is time, the few rows of decoding first."""
    return [
        asdict(measure.product(name, n, device, with_torch=False)) for n in ROWS for name in NAMES if is_time_left()
    ]


def attention(device: torch.device) -> list[dict]:
    """Measure decode of one and four sequences in each KV type, and one prefill."""
    cases = [("decode", kind, n, 1024) for kind in ("F16", "E5M2", "INT8") for n in (1, 4)]
    cases.append(("prefill", "F16", 1, 1024))
    return [asdict(measure.attention(*case, device)) for case in cases if is_time_left()]


def is_time_left() -> bool:
    """Whether another measurement may start."""
    return time.monotonic() < DEADLINE


PARTS: dict[str, Callable[[torch.device], object]] = {
    "rates": rates,
    "correctness": correctness,
    "products": products,
    "attention": attention,
}


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
    path: Path = parser.parse_args().file
    device = check(path)
    report: dict = {
        "card": torch.cuda.get_device_name(device),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "parts": {},
    }
    for name, part in PARTS.items():
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
    path.write_text(json.dumps(report, indent=1) + "\n")
    checked = report["parts"]["correctness"].get("result")
    right = isinstance(checked, list) and all(case["passed"] for case in checked)
    print(
        f"{path}: please attach it to an issue" + ("" if right else "; an operation gave a wrong result"),
        file=sys.stderr,
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
