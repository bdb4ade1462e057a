"""What the Grafana dashboards show, drawn by pascaline's own charts: a real Prometheus with the real rules and queries.

    ./dev exec python benchmarks/dashboard_pictures.py [--minutes 6]     writes docs/monitoring.md and its pictures

One host with two simulated Tesla P4, one real instance of `pascaline serve` on the fake engine of the tests, whose
load grows and shrinks. Needs Debian's package prometheus. Grafana itself draws the same queries in its own way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
DASHBOARDS = ROOT / "modules/monitoring/dashboards"
sys.path[:0] = [str(ROOT / "tests"), str(DASHBOARDS)]

from notes import NOTES  # noqa: E402
from pascaline.bench.svg_chart import Chart, Mark, Series, line_chart  # noqa: E402
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment, write_scenario  # noqa: E402
from support.instance import FAKE_ENGINE, Instance, running, wait_until  # noqa: E402
from support.models import tiny, write_gguf  # noqa: E402
from support.ports import free_port  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE, PICTURES = ROOT / "docs/monitoring.md", ROOT / "docs/pictures"
LABELS = {"host": "gpu-1", "name": "emily"}
SCRAPE_SECONDS, STEP_SECONDS = 2, 4
COLUMNS, GAP = 2, 16
MOST_SERIES = 6
"""Curves of one chart; a chart has as many colours."""
UNITS = {
    "bytes": ("GiB", 2**-30),
    "binBps": ("MiB/s", 2**-20),
    "hertz": ("GHz", 1e-9),
    "percent": ("%", 1.0),
    "percentunit": ("%", 100.0),
    "celsius": ("°C", 1.0),
    "watt": ("W", 1.0),
    "s": ("s", 1.0),
    "none": ("", 1.0),
    "short": ("", 1.0),
}
"""Grafana's unit -> what the chart shows, and the factor to it."""
INTRODUCTION = """# What the dashboards show

`modules/monitoring/dashboards/*.json` are three Grafana dashboards: the fleet, a host, an instance. \
[operations.md](operations.md#what-it-looks-like) says how to import them.
Every panel has a description, a unit and a link to the section of the runbook that says what to do.

The pictures here are not Grafana's. `benchmarks/dashboard_pictures.py` asked a real Prometheus, with the real rules, \
for the panels' own queries,
and drew the answers with the charts of `pascaline bench`: one host with two simulated Tesla P4, and one instance on \
the tests' engine under a load that changes.
So the curves show the form of each panel; they are no measurements of a P4.
"""


def main() -> None:
    """Collect, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="time under load (default: %(default)s)")
    minutes = parser.parse_args().minutes
    if shutil.which("prometheus") is None:
        sys.exit("dashboard_pictures.py: prometheus is not on PATH; install Debian's package prometheus")
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as programs:
        address = start(Path(folder), programs, minutes)
        sections = [section(name, address, minutes) for name in NOTES]
    PAGE.write_text("\n".join([INTRODUCTION, *sections]))


def start(folder: Path, programs: contextlib.ExitStack, minutes: float) -> str:
    """Run everything for some minutes; return Prometheus' address."""
    scenario = folder / "demo.nvml"
    write_scenario(scenario, DEMO_SCENARIO.read_text())
    environment = fake_nvml_environment(scenario)
    exporter = free_port()
    launch([sys.executable, "-m", "pascaline", "exporter", "--port", str(exporter)], folder, programs, environment)
    model = write_gguf(folder / "emily.gguf", tiny("llama"), "Q8_0")
    (folder / "instance").mkdir()
    instance = programs.enter_context(
        running(
            folder / "instance",
            model=model,
            engine_executable=FAKE_ENGINE,
            device="cpu",
            faults="decode_tokens_per_second=16 prefill_tokens_per_second=400",
        )
    )
    instance.wait_for_state("ready")
    ports = {
        "pascaline-exporter": exporter,
        "pascaline-agent": instance.settings["agent_port"],
        "pascaline-engine": instance.settings["port"],
    }
    address = start_prometheus(folder, programs, ports)
    work(instance, minutes)
    return address


def start_prometheus(folder: Path, programs: contextlib.ExitStack, ports: dict[str, int]) -> str:
    """Start Prometheus with the project's rules, evaluated as often as the targets are scraped."""
    rules = folder / "rules"
    rules.mkdir()
    for path in (ROOT / "modules/monitoring/rules").glob("*.yaml"):
        text = re.sub(r"^( *interval:) .*$", rf"\1 {SCRAPE_SECONDS}s", path.read_text(), flags=re.MULTILINE)
        (rules / path.name).write_text(text)
    jobs = [
        {
            "job_name": job,
            "static_configs": [
                {
                    "targets": [f"127.0.0.1:{port}"],
                    "labels": LABELS if job != "pascaline-exporter" else {"host": "gpu-1"},
                }
            ],
        }
        for job, port in ports.items()
    ]
    every = f"{SCRAPE_SECONDS}s"
    configuration = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [f"{rules}/*.yaml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(json.dumps(configuration))
    listen = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    launch(["prometheus", *flags, f"--web.listen-address={listen}"], folder, programs, dict(os.environ))
    address = f"http://{listen}"
    wait_until("all targets", lambda: len(ask(address, "query", query="up == 1")) == len(ports))
    return address


def launch(command: list[str], folder: Path, programs: contextlib.ExitStack, environment: dict[str, str]) -> None:
    """Start a program that ends with this one."""
    log = programs.enter_context((folder / f"{len(list(folder.iterdir()))}.log").open("w"))
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    programs.callback(process.wait)
    programs.callback(process.terminate)


def work(instance: Instance, minutes: float) -> None:
    """Send requests for some minutes: first one at a time, then more and more, then fewer."""
    end = time.monotonic() + 60 * minutes

    def client(number: int) -> None:
        time.sleep(60 * minutes * number / 20)
        while time.monotonic() < end - 60 * minutes * number / 30:
            with contextlib.suppress(OSError):
                instance.complete("word " * (40 + 60 * number), max_tokens=20 + 15 * number)
            time.sleep(0.5 + number % 3)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(10)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()


def section(name: str, address: str, minutes: float) -> str:
    """Draw a dashboard; return its part of the page."""
    panels = json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]
    drawn = {panel["title"]: chart for panel in panels if (chart := chart_of(panel, address, minutes))}
    picture = PICTURES / f"dashboard-{name}.svg"
    picture.write_text(joined(list(drawn.values())))
    rows = [
        f"| {title} | {note.text} | [what to do](operations.md#{note.section}) |" for title, note in NOTES[name].items()
    ]
    return "\n".join(
        [
            f"## {name.capitalize()}\n",
            f"![The curves of the dashboard {name}: {', '.join(drawn)}](pictures/{picture.name})\n",
            "| panel | shows | runbook |\n|---|---|---|",
            *rows,
            "",
        ]
    )


def chart_of(panel: dict[str, Any], address: str, minutes: float) -> str:
    """Return a panel of curves as SVG; empty if it is of another kind or has no data here."""
    if panel["type"] != "timeseries":
        return ""
    shown, factor = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], ("", 1.0))
    shown = shown or panel["fieldConfig"]["defaults"]["unit"].removeprefix("suffix:").replace("none", "").replace(
        "short", ""
    )
    now = time.time()
    series = [
        found for target in panel["targets"] for found in curves(target, address, (now - 60 * minutes, now), factor)
    ]
    return line_chart(Chart(panel["title"], "minutes", shown, series[:MOST_SERIES])) if series else ""


def curves(target: dict[str, Any], address: str, span: tuple[float, float], factor: float) -> Iterator[Series]:
    """Yield the answer to a query, a curve each."""
    expression = re.sub(r"\$(host|name)\b", ".*", target["expr"]).replace("$__rate_interval", "60s")
    found = ask(address, "query_range", query=expression, start=span[0], end=span[1], step=STEP_SECONDS)
    for each in found:
        labels = each["metric"]
        name = legend(target.get("legendFormat", ""), labels)
        values = [(float(at), float(value)) for at, value in each["values"] if value not in ("NaN", "+Inf")]
        if values:
            marks = [Mark(round((at - span[0]) / 60, 3), value * factor) for at, value in values]
            yield Series(name.removeprefix("gpu-1 ").removeprefix("emily ") or "gpu-1", marks, dots=False)


def legend(template: str, labels: dict[str, str]) -> str:
    """Return Grafana's legend with the labels in their places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template).strip()


def ask(address: str, what: str, **parameters: Any) -> list[dict[str, Any]]:
    """Ask Prometheus; empty while it does not answer."""
    url = f"{address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result
    return []


def joined(charts: list[str]) -> str:
    """Return one picture with all charts, in two columns."""
    sizes = [tuple(map(int, re.findall(r'(?:width|height)="(\d+)"', chart)[:2])) for chart in charts]
    wide, high = max(size[0] for size in sizes), max(size[1] for size in sizes)
    placed = [
        chart.replace("<svg ", f'<svg x="{n % COLUMNS * (wide + GAP)}" y="{n // COLUMNS * (high + GAP)}" ', 1)
        for n, chart in enumerate(charts)
    ]
    width = COLUMNS * (wide + GAP) - GAP
    height = -(-len(charts) // COLUMNS) * (high + GAP) - GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, *placed, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
