"""Measures how long a plan takes: reading the header of a 7B GGUF file, planning, optimising, refusing.

    python benchmarks/plan_time.py [--runs 20] [--json]

The file is sparse, with the published size. Library: median of calls in this process, after one warm-up call. Command:
median of whole processes, `pascaline plan FILE --card tesla-p4` with start-up and imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

if TYPE_CHECKING:
    from collections.abc import Callable

CARD = "tesla-p4"
MODEL, MIXTURE = "llama-2-7b", "Q4_K_M"
MAX_LOSS = 0.2


def median_ms(call: Callable[[], object], runs: int) -> float:
    """Return the median duration in milliseconds, after one call that is not counted."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(path: Path, runs: int) -> dict[str, float]:
    """Return milliseconds by what was done."""
    from pascaline.cards import load_card
    from pascaline.models.reader import read_model
    from pascaline.planning import PlanRequest, make_plan, nearest_fits
    from pascaline.planning.search import optimize

    card, spec = load_card(CARD), read_model(path)
    request = PlanRequest(card_bytes=card.memory_bytes, context_length=4096, mem_fraction_static=0.9)
    too_much = PlanRequest(card_bytes=card.memory_bytes, context_length=65536)
    command = [sys.executable, "-m", "pascaline", "plan", str(path), "--card", CARD]

    def run(*options: str) -> Callable[[], object]:
        return lambda: subprocess.run([*command, *options], stdout=subprocess.DEVNULL, check=True)

    found = {
        "read the header": median_ms(lambda: read_model(path), runs),
        "plan": median_ms(lambda: make_plan(spec, card, request), runs),
        "nearest that fit": median_ms(lambda: nearest_fits(spec, card, too_much), runs),
    }
    for goal in ("throughput", "latency", "context"):
        found[f"optimize {goal}"] = median_ms(lambda goal=goal: optimize(spec, card, request, goal, MAX_LOSS), runs)
    found["command plan"] = median_ms(run(), max(3, runs // 4))
    found["command plan --optimize throughput"] = median_ms(run("--optimize", "throughput"), max(3, runs // 4))
    return found


def main() -> None:
    """Make the file, measure, print."""
    from support.models import SHAPES, write_gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / f"{MODEL}.gguf", SHAPES[MODEL], MIXTURE, sparse=True)
        found = measure(path, arguments.runs)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{MODEL} {MIXTURE} on {CARD}, median of {arguments.runs} runs")
    for what, milliseconds in found.items():
        print(f"  {what:<36}{milliseconds:>10,.2f} ms")


if __name__ == "__main__":
    main()
