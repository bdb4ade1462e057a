"""Mixed load with random faults for hours: no unexplained restart, no growth, every request accounted for.

    python benchmarks/soak.py [--seconds 7200] [--seed N] > docs/results/soak.md

One instance on the fake engine. Every few seconds a fault is drawn: some must lead to a restart, some to nothing.
Prints the seed, the restarts that were explained and those that were not, the slopes of memory, descriptors and
threads, and the ledger. Exit code 1 if a restart is unexplained, something grows, or a request has no entry.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
from faults import injectors as i
from faults.scene import Fault, Scene
from support.instance import PATIENCE
from support.ledger import Load, Outcome, stretch
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 7200.0
QUIET_SECONDS = (2.0, 8.0)
"""Time between two faults: from, to."""
WARM_SHARE = 0.3
"""Share of the run after which growth is measured: caches fill first."""
LIMITS = {"memory, MiB": 20.0, "descriptors": 10.0, "threads": 6.0}
"""Most growth over the measured part."""
RESTARTS = {
    "engine: SIGKILL": i.signal_engine("SIGKILL"),
    "scheduler: SIGKILL": i.signal_worker("SIGKILL"),
    "scheduler hangs": i.tell(hang=1),
    "answers are lost": i.tell(lose_answers=1),
    "status 500": i.tell(error_status=500),
}
NOTHING = {
    "/metrics is +Inf": i.answer("/metrics", i.ok('sglang:num_running_reqs{model_name="m"} +Inf\n')),
    "/metrics is well": i.tell(raw_path=""),
    "half requests to the agent": i.connections(50, b"GET / HTTP/1.1\r\n"),
    "noise to the agent": i.garbage(50),
    "a burst of requests": i.burst(16),
    "flood of lines": i.tell(flood_lines_per_second=5_000),
    "no flood of lines": i.tell(flood_lines_per_second=0),
    "supervisor paused": i.pause(1, "supervisor"),
}
FAULT = Fault(name="soak", group="soak", inject=i.nothing, outcome="stays", settings={"max_restarts": 1000})


@dataclass
class Soak:
    """What a run found."""

    seed: int
    seconds: float
    injected: dict[str, int] = field(default_factory=dict)
    expected: int = 0
    """Restarts that the injected faults explain."""
    restarts: int = 0
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {name: [] for name in LIMITS})
    ledger: str = ""
    problems: list[str] = field(default_factory=list)

    def sample(self, process: psutil.Process) -> None:
        """Measure the supervisor."""
        values = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
        for name, value in zip(LIMITS, values, strict=True):
            self.samples[name].append((time.monotonic(), value))

    def growth(self, name: str) -> float:
        """Return the growth over the measured part, by a straight line through the samples."""
        samples = self.samples[name][int(len(self.samples[name]) * WARM_SHARE) :]
        return slope(samples) * (samples[-1][0] - samples[0][0])


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Return the slope of a straight line through (time, value), by least squares; 0 for fewer than two times."""
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def soak(folder: Path, model: Path, seconds: float, seed: int) -> Soak:
    """Run it."""
    found, rng = Soak(seed, seconds), random.Random(seed)
    scene = Scene(folder, model, FAULT)
    with scene.after, scene.serving() as instance:
        patience = PATIENCE * stretch()
        instance.wait_for_state("ready", seconds=patience)
        process = psutil.Process(instance.process.pid)
        with Load(scene.port, clients=4) as load:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                one_fault(scene, found, rng)
                found.sample(process)
        instance.wait_for_state("ready", "busy", seconds=patience)
        found.restarts = instance.health()["restarts"]
        errors = instance.metric("pascaline_internal_errors_total")
        code = instance.stop(seconds=patience)
        found.ledger = str(load.ledger)
        judge(found, errors=errors, code=code)
        if not load.ledger.is_balanced or load.ledger.count(Outcome.SILENT):
            found.problems.append(f"the ledger: {load.ledger.sent} sent, {load.ledger}")
    return found


def one_fault(scene: Scene, found: Soak, rng: random.Random) -> None:
    """Draw a fault; after one that must lead to a restart, wait for it and for the recovery."""
    restarts = rng.random() < 0.25
    name = rng.choice(sorted(RESTARTS if restarts else NOTHING))
    found.injected[name] = found.injected.get(name, 0) + 1
    before = scene.instance.health()["restarts"]
    (RESTARTS | NOTHING)[name](scene)
    if restarts:
        found.expected += 1
        deadline = time.monotonic() + PATIENCE * stretch()
        while scene.instance.health().get("restarts", before) == before:
            if time.monotonic() > deadline:
                found.problems.append(f"no restart after {name!r}")
                return
            time.sleep(0.2)
        scene.instance.wait_for_state("ready", "busy", seconds=2 * PATIENCE * stretch())
    time.sleep(rng.uniform(*QUIET_SECONDS))


def judge(found: Soak, *, errors: float, code: int) -> None:
    """Note what must not be."""
    if found.restarts != found.expected:
        found.problems.append(f"{found.restarts} restarts, {found.expected} are explained")
    if errors or code:
        found.problems.append(f"{errors:g} internal errors, exit code {code}")
    for name, limit in LIMITS.items():
        if found.growth(name) > limit:
            found.problems.append(f"{name} grew by {found.growth(name):.1f}, must be {limit:g} at most")


def page(found: Soak) -> str:
    """Return the report."""
    lines = [
        "# Soak\n",
        f"`benchmarks/soak.py --seconds {found.seconds:g} --seed {found.seed}`, {datetime.now(UTC).date()}, "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}; one instance on the fake engine, 4 clients.\n",
        f"- restarts: {found.restarts}; the injected faults explain {found.expected}",
        f"- requests: {found.ledger}",
        f"- problems: {'; '.join(found.problems) or 'none'}\n",
        "| of the supervisor | first | last | growth after the first third | slope, per hour |",
        "|---|---|---|---|---|",
    ]
    for name, samples in found.samples.items():
        measured = samples[int(len(samples) * WARM_SHARE) :]
        lines.append(
            f"| {name} | {samples[0][1]:.1f} | {samples[-1][1]:.1f} | {found.growth(name):.1f} | "
            f"{slope(measured) * 3600:.1f} |"
        )
    lines += [
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {name} | {n} |" for name, n in sorted(found.injected.items())),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of the run (default: two hours)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9), help="default: a new one")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the instance and removes the folder
    folder = Path(tempfile.mkdtemp(prefix="pascaline-soak-"))
    try:
        model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
        found = soak(folder, model, arguments.seconds, arguments.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(page(found))
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
