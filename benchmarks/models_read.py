"""Time and memory of reading a 7B model's header: our reader and the gguf package's, each in its own process.

    python benchmarks/models_read.py [--runs 5]

The file is sparse: 32 layers, a vocabulary of 152,064 tokens with 151,387 merges, a Q4_K_M mixture, 4.3 GB.
Time is the median over the runs of one read in a new process, without imports. Memory is the process's peak minus what
it held before the read (VmHWM), and what Python allocated (tracemalloc, in a separate run).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CHILD = """
import json, sys, time, tracemalloc

def peak():
    # ru_maxrss would count what the parent held when it forked.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

reader, path, trace = sys.argv[1], sys.argv[2], sys.argv[3] == "trace"
if reader == "pascaline":
    from pascaline.models.gguf import read_gguf as read
else:
    from gguf import GGUFReader as read
before = peak()
if trace:
    tracemalloc.start()
started = time.perf_counter()
found = read(path)
seconds = time.perf_counter() - started
print(json.dumps({
    "seconds": seconds,
    "resident_bytes": peak() - before,
    "process_bytes": peak(),
    "allocated_bytes": tracemalloc.get_traced_memory()[1] if trace else 0,
    "tensors": len(found.tensors),
}))
"""
MIB = 1 << 20


def measure(reader: str, path: Path, *, trace: bool = False) -> dict[str, float]:
    """Read the file once in a new process."""
    command = [sys.executable, "-c", CHILD, reader, str(path), "trace" if trace else "plain"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return {name: float(number) for name, number in json.loads(answer.stdout).items()}


def main() -> None:
    """Make the file, read it with both, print the table."""
    from pascaline.text_table import LEFT, RIGHT, table_lines
    from support.models import SHAPES, write_gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="reads of each reader (default 5)")
    arguments = parser.parse_args()
    shape = replace(SHAPES["llama-3.1-8b"], name="7b", vocab_size=152_064, merges=151_387, intermediate_size=11_008)
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "model.gguf", shape, "Q4_K_M", sparse=True)
        print(f"file: {path.stat().st_size:,} bytes, of them {path.stat().st_blocks * 512 / MIB:.1f} MiB on disk")
        titles = ("median s", "slowest s", "resident MiB", "allocated MiB", "process MiB")
        rows = [("reader", *titles)]
        for reader in ("pascaline", "gguf"):
            runs = [measure(reader, path) for _ in range(arguments.runs)]
            traced = measure(reader, path, trace=True)
            seconds = [run["seconds"] for run in runs]
            resident = max(run["resident_bytes"] for run in runs) / MIB
            process = max(run["process_bytes"] for run in runs) / MIB
            numbers = (statistics.median(seconds), max(seconds), resident, traced["allocated_bytes"] / MIB, process)
            rows.append((reader, *(f"{number:.3f}" for number in numbers)))
        print("\n".join(table_lines(rows, [LEFT, *[RIGHT] * len(titles)])))


if __name__ == "__main__":
    main()
