"""Compares the exporter's values with what nvidia-smi prints at the same moment, idle and under load.

    python benchmarks/nvml_compare.py --output docs/results/ [--capture tests/gpu/captures/]

Each sample is nvidia-smi, a reading, nvidia-smi again. A value agrees if it lies between the two, within the tolerance
of its row. Texts are compared once; UUID and serial number are not printed. Needs only Python 3.11, the package
pascaline.gpu and pynvml on PYTHONPATH; torch, if installed, makes the load. Nothing about the card is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.gpu.capture import to_scenario
from pascaline.gpu.reader import Reader
from pascaline.gpu.render import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.gpu.reading import Reading

SAMPLES = 10
WARM_UP_SECONDS = 5.0
"""Load before the first sample, so that clocks, power and temperature have risen."""
MATRIX_SIZE = 8192
ACTIVE, ENABLED = {"Active": 1.0, "Not Active": 0.0}, {"Enabled": 1.0, "Disabled": 0.0, "Yes": 1.0, "No": 0.0}
ABSENT = {"[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]", "[Unknown Error]", "[GPU requires reset]"}


@dataclass(frozen=True)
class Row:
    """One value: nvidia-smi's field and our series."""

    smi: str
    series: str
    labels: dict[str, str] = field(default_factory=dict)
    factor: float = 1.0
    """Our value times this is in nvidia-smi's unit."""
    tolerance: float = 0.0
    """Allowed distance from the range of the two neighbours, in nvidia-smi's unit: its rounding, or drift."""
    why: str = ""


MIB = 2.0**-20
ROUNDED_DOWN = "rounded to MiB"
ROWS = (
    Row("memory.total", "memory_total_bytes", factor=MIB, tolerance=1, why=ROUNDED_DOWN),
    Row("memory.used", "memory_used_bytes", factor=MIB, tolerance=1, why=ROUNDED_DOWN),
    Row("memory.free", "memory_free_bytes", factor=MIB, tolerance=1, why=ROUNDED_DOWN),
    Row("memory.reserved", "memory_reserved_bytes", factor=MIB, tolerance=1, why=ROUNDED_DOWN),
    Row("utilization.gpu", "utilization_gpu", tolerance=5, why="sampled anew every 1/6 s"),
    Row("utilization.memory", "memory_bus_utilization_ratio", factor=100, tolerance=5, why="sampled anew every 1/6 s"),
    Row("temperature.gpu", "temperature_gpu", tolerance=1, why="moves under load"),
    Row("temperature.memory", "memory_temperature_celsius", tolerance=1, why="moves under load"),
    Row("power.draw", "power_draw", tolerance=15, why="moves under load"),
    Row("enforced.power.limit", "power_limit_watts", {"limit": "enforced"}, tolerance=0.01),
    Row("power.limit", "power_limit_watts", {"limit": "management"}, tolerance=0.01),
    Row("power.default_limit", "power_limit_watts", {"limit": "default"}, tolerance=0.01),
    Row("power.min_limit", "power_limit_watts", {"limit": "min"}, tolerance=0.01),
    Row("power.max_limit", "power_limit_watts", {"limit": "max"}, tolerance=0.01),
    Row("clocks.gr", "clock_hertz", {"clock": "graphics"}, 1e-6, 60, "moves under load"),
    Row("clocks.sm", "clock_hertz", {"clock": "sm"}, 1e-6, 60, "moves under load"),
    Row("clocks.mem", "clock_hertz", {"clock": "memory"}, 1e-6),
    Row("clocks.video", "clock_hertz", {"clock": "video"}, 1e-6, 60, "moves under load"),
    Row("clocks.max.gr", "max_clock_hertz", {"clock": "graphics"}, 1e-6),
    Row("clocks.max.sm", "max_clock_hertz", {"clock": "sm"}, 1e-6),
    Row("clocks.max.mem", "max_clock_hertz", {"clock": "memory"}, 1e-6),
    Row("clocks.applications.gr", "application_clock_hertz", {"clock": "graphics"}, 1e-6),
    Row("clocks.applications.mem", "application_clock_hertz", {"clock": "memory"}, 1e-6),
    Row("pstate", "performance_state"),
    *(
        Row(f"clocks_throttle_reasons.{reason}", "throttle_reason", {"reason": reason})
        for reason in (
            *("gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost"),
            *("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"),
        )
    ),
    Row("fan.speed", "fan_speed_ratio", factor=100, tolerance=1),
    Row("pcie.link.gen.current", "pcie_link_generation"),
    Row("pcie.link.gen.max", "pcie_link_max_generation"),
    Row("pcie.link.width.current", "pcie_link_width"),
    Row("pcie.link.width.max", "pcie_link_max_width"),
    Row("persistence_mode", "persistence_mode"),
    Row("ecc.mode.current", "ecc_enabled"),
    Row("ecc.mode.pending", "ecc_enabled_pending"),
    *(
        Row(
            f"ecc.errors.{error}.{counter}.{place}",
            "ecc_errors_total",
            {"error": error, "counter": counter, "location": location},
        )
        for error in ("corrected", "uncorrected")
        for counter in ("volatile", "aggregate")
        for place, location in (
            *((name, name) for name in ("total", "device_memory", "register_file", "l1_cache", "l2_cache")),
            *(("texture_memory", "texture_memory"), ("cbu", "control_block"), ("sram", "sram")),
        )
    ),
    Row("retired_pages.single_bit_ecc.count", "retired_pages", {"cause": "multiple_single_bit"}),
    Row("retired_pages.double_bit.count", "retired_pages", {"cause": "double_bit"}),
    Row("retired_pages.pending", "retired_pages_pending"),
    Row("remapped_rows.correctable", "remapped_rows", {"error": "corrected"}),
    Row("remapped_rows.uncorrectable", "remapped_rows", {"error": "uncorrected"}),
    Row("remapped_rows.pending", "remapped_rows_pending"),
    Row("remapped_rows.failure", "remapped_rows_failed"),
    Row("mig.mode.current", "mig_enabled"),
)
NOT_QUERIED = {
    "temperature_threshold_celsius": "",
    "energy_joules_total": "",
    "pcie_replays_total": "",
    "pcie_throughput_bytes_per_second": "",
    "max_clock_hertz": "video",
    "throttle_reason": "display_clock_setting",
    "ecc_errors_total": "texture_shared_memory",
}
"""Metrics without a field in `nvidia-smi --query-gpu`: all of one, or (if not empty) those with this label's value."""
TEXTS = {
    "name": "name",
    "serial": "serial",
    "pci.bus_id": "pci_bus_id",
    "vbios_version": "vbios_version",
    "compute_cap": "compute_capability",
}
"""nvidia-smi's field -> our label of nvidia_gpu_info."""


def query(gpu: int, fields: list[str]) -> dict[str, str]:
    """Ask nvidia-smi for fields of one GPU."""
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (values,) = csv.reader(io.StringIO(output), skipinitialspace=True)
    return dict(zip(fields, values, strict=True))


def known_fields(gpu: int) -> list[str]:
    """Return the fields of ROWS that this nvidia-smi knows: one unknown name makes the whole query fail."""
    known = []
    for row in ROWS:
        with contextlib.suppress(subprocess.CalledProcessError):
            query(gpu, [row.smi])
            known.append(row.smi)
    return known


def number(text: str) -> float | None:
    """Return nvidia-smi's text as a number; None if it is not one."""
    if text in ABSENT:
        return None
    for words in (ACTIVE, ENABLED):
        if text in words:
            return words[text]
    found = re.search(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else None


def ours(reading: Reading, gpu: int, row: Row) -> float | None:
    """Return our value in nvidia-smi's unit; None if the exporter emits none."""
    series = to_json(reading)["gpus"][gpu]["series"].get(row.series)
    if isinstance(series, list):
        series = next((s["value"] for s in series if all(s[k] == v for k, v in row.labels.items())), None)
    return None if series is None else series * row.factor


def our_texts(reading: Reading, gpu: int) -> dict[str, str]:
    """Return our texts by nvidia-smi's field."""
    described = to_json(reading)
    device = described["gpus"][gpu]
    texts = {smi: device["info"][label] for smi, label in TEXTS.items()}
    return texts | {"uuid": device["uuid"], "driver_version": described["driver"]["driver_version"]}


def differing_texts(reading: Reading, gpu: int) -> list[str]:
    """Return the fields whose texts differ; our text is empty if nvidia-smi has none."""
    mine = our_texts(reading, gpu)
    theirs = query(gpu, list(mine))
    return [smi for smi, text in mine.items() if text != ("" if theirs[smi] in ABSENT else theirs[smi])]


@dataclass
class Outcome:
    """The result of a row over all samples of one load."""

    agreed: int = 0
    compared: int = 0
    absent: int = 0
    """Samples in which neither side has a value."""
    worst: str = ""
    """The last disagreement, or else the last pair."""

    def add(self, before: float | None, mine: float | None, after: float | None, tolerance: float) -> None:
        """Judge one sample."""
        if before is None and after is None and mine is None:
            self.absent += 1
            return
        self.compared += 1
        inside = (
            mine is not None
            and before is not None
            and after is not None
            and min(before, after) - tolerance <= mine <= max(before, after) + tolerance
        )
        self.agreed += inside
        if not inside or self.agreed == self.compared:
            self.worst = f"{shown(before)}, {shown(after)} / {shown(mine)}"


def shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.10g}" if value == int(value) else f"{value:.2f}"


def compare(reader: Reader, gpu: int, fields: list[str]) -> dict[str, Outcome]:
    """Take SAMPLES triples of nvidia-smi, reading, nvidia-smi."""
    rows = [row for row in ROWS if row.smi in fields]
    outcomes = {row.smi: Outcome() for row in rows}
    for _ in range(SAMPLES):
        before = query(gpu, fields)
        reading = reader.read()
        after = query(gpu, fields)
        for row in rows:
            values = number(before[row.smi]), ours(reading, gpu, row), number(after[row.smi])
            outcomes[row.smi].add(*values, row.tolerance)
    return outcomes


@contextlib.contextmanager
def load(seconds: float) -> Iterator[bool]:
    """Multiply matrices in another process, from `seconds` before the body to its end; False if torch cannot."""
    program = (
        "import sys, time, torch\n"
        f"a = torch.randn({MATRIX_SIZE}, {MATRIX_SIZE}, device='cuda', dtype=torch.float16)\n"
        "b = a.clone()\nprint('ready', flush=True)\n"
        "while True:\n    for _ in range(50): c = a @ b\n    torch.cuda.synchronize()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            assert child.stdout is not None
            ready = child.stdout.readline().strip() == "ready"
            if ready:
                time.sleep(seconds)
            yield ready
        finally:
            child.kill()


def table(outcomes: dict[str, dict[str, Outcome]]) -> list[str]:
    """Return the Markdown lines: one row per field, two columns per load."""
    lines = [
        "| nvidia-smi | ours | "
        + " | ".join(f"{name}: agreed | {name}: nvidia-smi before, after / ours" for name in outcomes)
    ]
    lines[0] += " | allowed difference |"
    lines.append("|---" * (2 + 2 * len(outcomes) + 1) + "|")
    for row in ROWS:
        found = [by_field[row.smi] for by_field in outcomes.values() if row.smi in by_field]
        if not found:
            continue
        labels = "{" + ",".join(f'{k}="{v}"' for k, v in row.labels.items()) + "}" if row.labels else ""
        cells = [f"| {cell(o)} | {o.worst or 'both absent'} " for o in found]
        allowed = f"{row.tolerance:g} ({row.why})" if row.why else f"{row.tolerance:g}"
        lines.append(f"| `{row.smi}` | `{row.series}{labels}` {''.join(cells)}| {allowed} |")
    return lines


def cell(outcome: Outcome) -> str:
    return f"{outcome.agreed} of {outcome.compared}" if outcome.compared else f"absent on both sides ({outcome.absent})"


def run(gpu: int, output: Path, capture: Path | None) -> int:
    """Compare, write the table (and the capture), and return 1 if any value disagreed."""
    name = query(gpu, ["name"])["name"]
    driver = query(gpu, ["driver_version"])["driver_version"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    fields = known_fields(gpu)
    outcomes: dict[str, dict[str, Outcome]] = {}
    with Reader() as reader:
        first = reader.read()
        if not first.succeeded:
            print(f"nvml_compare: {first.status}: {first.message}", file=sys.stderr)
            return 1
        differing = differing_texts(first, gpu)
        outcomes["idle"] = compare(reader, gpu, fields)
        with load(WARM_UP_SECONDS) as loaded:
            if loaded:
                outcomes["load"] = compare(reader, gpu, fields)
            if capture:
                today = datetime.datetime.now(datetime.UTC).date()
                state = "under load" if loaded else "idle"
                title = f"{name}, driver {driver}, {state}, recorded {today} by benchmarks/nvml_compare.py"
                (capture / f"{slug}.nvml").write_text(anonymous(to_scenario(reader.read(), title=title)))
    missing = [row.smi for row in ROWS if row.smi not in fields]
    output.mkdir(parents=True, exist_ok=True)
    texts = [smi for smi in our_texts(first, gpu) if smi not in differing]
    (output / f"nvml-{slug}.md").write_text(report(name, driver, outcomes, texts, missing))
    wrong = [f"texts differ: {smi}" for smi in differing]
    wrong += [
        f"{name}: {smi}: {o.worst}" for name, by in outcomes.items() for smi, o in by.items() if o.agreed < o.compared
    ]
    print("\n".join(wrong) or f"all values agree: {output / f'nvml-{slug}.md'}")
    return bool(wrong)


def anonymous(scenario: str) -> str:
    """Replace what identifies the single card."""
    scenario = re.sub(r"(nvmlDeviceGetSerial = )\d+", r"\g<1>0", scenario)
    numbered = iter(range(1000))
    return re.sub(
        r"(nvmlDeviceGetUUID = GPU-)\S+",
        lambda found: f"{found[1]}00000000-0000-4000-8000-{next(numbered):012}",
        scenario,
    )


def report(
    name: str, driver: str, outcomes: dict[str, dict[str, Outcome]], texts: list[str], missing: list[str]
) -> str:
    """Return the whole page."""
    compared = sum(o.compared for by in outcomes.values() for o in by.values())
    agreed = sum(o.agreed for by in outcomes.values() for o in by.values())
    head = [
        f"# Exporter against nvidia-smi: {name}",
        "",
        f"Driver {driver}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, `benchmarks/nvml_compare.py`, "
        f"{SAMPLES} samples for each load.",
        f"{agreed} of {compared} compared values agree: ours lies between nvidia-smi just before and just after, "
        "give or take the last column.",
        "Units are nvidia-smi's.",
        f"Texts that are equal: {', '.join(texts)}. No field of nvidia-smi's query has what these say: "
        + ", ".join(f"{series} ({value})" if value else series for series, value in NOT_QUERIED.items())
        + ".",
        "",
    ]
    if "load" not in outcomes:
        head += ["Load was not measured: torch with CUDA is not installed here.", ""]
    tail = ["", f"Not known to this nvidia-smi: {', '.join(missing)}."] if missing else []
    return "\n".join([*head, *table(outcomes), *tail]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=0, help="NVML's number of the GPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the table")
    parser.add_argument("--capture", type=Path, help="folder to which a capture is written, too")
    arguments = parser.parse_args()
    if not shutil.which("nvidia-smi"):
        print("nvml_compare: no nvidia-smi on PATH; run this on a host with the NVIDIA driver", file=sys.stderr)
        return 8
    return run(arguments.gpu, arguments.output, arguments.capture)


if __name__ == "__main__":
    sys.exit(main())
