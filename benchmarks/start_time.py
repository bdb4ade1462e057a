"""Prints where the time of a start goes: `pascaline serve` of a model, from the command to its readiness.

    python benchmarks/start_time.py MODEL.gguf [--device cuda] [--cold] [--spawn] [--twice] [--json FILE] [--log FILE]

`--cold` first drops the file from the page cache and reads the first half by itself for the disk's own speed. `--spawn`
starts SGLang's workers as SGLang does, each with imports of its own. `--twice` starts again with what the first start
left: checksum and prepared folder; a first start of a file has to compute its checksum. Seconds are since the command.
`--log` keeps every line of the server with its time. Exit code 1 if the server did not become ready.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

READY_SECONDS = 300
EVENTS = {
    "engine started": r"starting|started engine|engine_started",
    "arguments read, imports of the server done": r"server_args=",
    "scheduler runs": r"Init torch distributed begin|Init torch distributed",
    "weights begin": r"Load weight begin",
    "weights read": r"weights held|Load weight end",
    "memory pools made": r"KV Cache is allocated|Memory pool end",
    "recording begins": r"Capture .*graph.* begin",
    "steps recorded": r"Capture .*graph.* end",
    "HTTP begins": r"Started server process|Uvicorn running|Application startup complete",
    "first answer": r"fired up and ready",
}
"""What happens -> the log line that says so; the first one for beginnings, else the last."""
STOP_SECONDS = 20
CHUNK = 16 * 2**20


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache first")
    parser.add_argument("--spawn", action="store_true", help="workers with imports of their own")
    parser.add_argument("--twice", action="store_true", help="start again with the first start's cache")
    parser.add_argument("--seconds", type=float, default=READY_SECONDS, help="limit of a start (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--log", type=Path, help="write the server's lines there, with their times")
    args = parser.parse_args(arguments)
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    return args


def main(arguments: Sequence[str]) -> int:
    """Start, wait, stop, print."""
    args = parse(arguments)
    results: dict[str, Any] = {"model": args.model.name, "file_bytes": args.model.stat().st_size, "starts": []}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(1 + args.twice):
            if args.cold:
                drop(args.model)
                results["disk_bytes_per_second"] = round(disk_speed(args.model))
                drop(args.model)
            results["starts"].append(start(args, Path(scratch)))
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))
    return 0 if all(each["ready_seconds"] is not None for each in results["starts"]) else 1


def drop(path: Path) -> None:
    """Ask the kernel to forget the file's pages."""
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(path: Path) -> float:
    """Return bytes per second of a plain read of the first half."""
    wanted, begin, done = path.stat().st_size // 2, time.monotonic(), 0
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while done < wanted and (n := file.readinto(buffer)):
            done += n
    return done / (time.monotonic() - begin)


def start(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start once; return the seconds of each event."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "pascaline", "serve", "--model", str(args.model.resolve()), "--device", args.device),
        *("--port", str(port), "--agent-port", str(free_port()), "--cache-dir", str(scratch / "cache")),
        *("--context-length", "4096", "--max-running-requests", "8", "--start-timeout", str(args.seconds)),
    ]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    if args.spawn:
        environment["SGLANG_PASCAL_WORKERS"] = "spawn"
    began = time.monotonic()
    lines: list[tuple[float, str]] = []
    with (
        args.log.open("a", encoding="utf-8") if args.log else contextlib.nullcontext() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process,
    ):
        reader = threading.Thread(target=collect, args=(process.stderr, began, lines, log), daemon=True)
        reader.start()
        ready = wait(process, port, began, args.seconds)
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(STOP_SECONDS)
    return {"spawned": args.spawn, "cold": args.cold, "ready_seconds": ready, "events": events(lines)}


def collect(stream: IO[str], began: float, lines: list[tuple[float, str]], log: IO[str] | None) -> None:
    """Add each line with its time; write it to the log at once, which so survives the end of this program."""
    for line in stream:
        lines.append((round(time.monotonic() - began, 2), line.rstrip("\n")))
        if log:
            log.write(f"[{lines[-1][0]:7.2f}] {lines[-1][1]}\n")
            log.flush()


def wait(process: subprocess.Popen[str], port: int, began: float, seconds: float) -> float | None:
    """Return the seconds until the engine answers; None if it did not become ready."""
    while time.monotonic() < began + seconds and process.poll() is None:
        if is_ready(port):
            return round(time.monotonic() - began, 2)
        time.sleep(0.05)
    return None


def is_ready(port: int) -> bool:
    """Whether the engine says that it serves."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def events(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Return event -> seconds."""
    found = {}
    for name, pattern in EVENTS.items():
        times = [seconds for seconds, line in lines if re.search(pattern, line)]
        if times:
            found[name] = times[0] if "begin" in name or "runs" in name else times[-1]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
