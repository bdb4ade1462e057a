"""The GPU report as a page: what was found, charts, then every table. Loads nothing from outside.

    ./dev exec python benchmarks/gpu_page.py docs/results/kernels-NAME.json     writes the .html beside it

gpu_report.py makes the JSON, on a machine with a GPU.
"""

from __future__ import annotations

import html
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pascaline.bench.html_page import page
from pascaline.bench.svg_chart import Chart, Mark, Series, bar_chart

TITLES = {
    "environment": "Where it was measured",
    "rates": "Rates of the card",
    "products": "Matrix products",
    "attention": "Attention",
    "engine": "Engine",
    "serve": "Served model",
    "servers": "Servers beside each other",
    "numerics": "Numbers against the reference",
    "sanitizer": "Memory checker",
    "tests": "Test suites",
}
"""Part of the report -> heading; others are named as they are."""
UNITS = {"us": "µs", "bytes": "bytes", "seconds": "s"}
STYLE = """p { max-width: 60rem; } summary { cursor: pointer; }
td, th { vertical-align: top; } table table { margin: 0; }
"""


def as_html(report: dict[str, Any]) -> str:
    """Return the page."""
    place = report["environment"]
    card = html.escape(place["card"])
    body = [
        f"<h1>Kernels on {card}</h1>",
        f"<p>Driver {html.escape(place['driver'])}, torch {html.escape(place['torch'])}, {html.escape(place['date'])}. "
        "The kernels are compiled for Pascal; a newer card runs their PTX. Its times say nothing of a Pascal card.</p>",
        "<h2>What was found</h2>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in findings(report)),
        f'<div class="charts">{"".join(charts(report))}</div>',
        *(part for name, value in report.items() for part in _section(name, value)),
    ]
    return page(f"Kernels on {place['card']}", body, STYLE)


def findings(report: dict[str, Any]) -> list[str]:
    """Return the results in a sentence each; a part that was not run has none."""
    found = []
    for name, value in report.items():
        if name.startswith("selftest"):
            failed = len(value.get("failed", []))
            cases = len(value.get("cases", []))
            found.append(f"{name}: {value['state']}, {cases - failed} of {cases} cases agree with the reference.")
    if shares := _shares(report.get("products", [])):
        faster = sum(share <= 1 for share in shares)
        found.append(
            f"Matrix products: {faster} of {len(shares)} take no longer than llama.cpp's on this card; the median "
            f"takes {statistics.median(shares):.2f} of its time."
        )
    if shares := _shares(report.get("attention", [])):
        found.append(
            f"Attention: the median takes {statistics.median(shares):.2f} of the time of llama.cpp's on this card."
        )
    return found + [f"{TITLES[name]}: {report[name]['state']}." for name in ("sanitizer", "tests") if name in report]


def charts(report: dict[str, Any]) -> list[str]:
    """Return the charts; one without data is left out."""
    products = report.get("products", [])
    types = list(dict.fromkeys(row["tensor_type"] for row in products))
    made = []
    if bandwidth := report.get("rates", {}).get("stream_bandwidth"):
        series = [_medians(products, types, n, lambda row: 100 * row["bandwidth"] / bandwidth) for n in (1, 2)]
        made.append(_bars("Memory speed of products", "% of the card's copy speed", series, types))
    sizes = sorted({row["n"] for row in products if "share_of_ggml" in row})
    chosen = [size for size in sizes if size in (1, 8, 512)] or sizes[:3]
    series = [_medians(products, types, n, lambda row: row.get("share_of_ggml")) for n in chosen]
    made.append(_bars("Time of products, llama.cpp's = 1", "share of its time", series, types))
    return [chart for chart in made if chart]


def _medians(rows: list[dict[str, Any]], types: list[str], n: int, value: Any) -> Series:
    """Return the median over all shapes, by type of the weights."""
    marks = []
    for place, name in enumerate(types):
        of_type = (value(row) for row in rows if row["n"] == n and row["tensor_type"] == name)
        if values := [each for each in of_type if each is not None]:
            marks.append(Mark(place, statistics.median(values)))
    return Series(f"{n} token{'s' if n > 1 else ''}", marks)


def _bars(title: str, unit: str, series: list[Series], types: list[str]) -> str:
    drawn = [each for each in series if each.marks]
    return bar_chart(Chart(title, "type of the weights, median over shapes", unit, drawn, types)) if drawn else ""


def _shares(rows: list[dict[str, Any]]) -> list[float]:
    return [row["share_of_ggml"] for row in rows if row.get("share_of_ggml") is not None]


def _section(name: str, value: Any) -> list[str]:
    title = html.escape(TITLES.get(name, name))
    if not isinstance(value, (dict, list)):
        return [f"<h2>{title}</h2>", f"<p>{_cell(value)}</p>"]
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return [f"<h2>{title}</h2>", "<ul>", *(f"<li>{_cell(each)}</li>" for each in value), "</ul>"]
    content = f'<div class="scroll">{_table(value)}</div>'
    if name in {"environment", "rates", "products", "attention"}:
        return [f"<h2>{title}</h2>", content]
    state = f": {html.escape(str(value['state']))}" if isinstance(value, dict) and "state" in value else ""
    return [f"<h2>{title}{state}</h2>", f"<details><summary>Details</summary>{content}</details>"]


def _table(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        keys = list(dict.fromkeys(key for row in value for key in row))
        head = "".join(f"<th>{html.escape(_words(key))}</th>" for key in keys)
        body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(key))}</td>" for key in keys) + "</tr>" for row in value)
        return f"<table><tr>{head}</tr>{body}</table>"
    if isinstance(value, dict):
        rows = (
            f"<tr><th>{html.escape(_words(str(key)))}</th><td>{_table(each)}</td></tr>" for key, each in value.items()
        )
        return f"<table>{''.join(rows)}</table>"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return _cell(value)


def _words(key: str) -> str:
    """Return a key as a heading: its unit after a comma."""
    name, _, unit = key.rpartition("_")
    return f"{name.replace('_', ' ')}, {UNITS[unit]}" if name and unit in UNITS else key.replace("_", " ")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def main() -> None:
    """Write the page of each report."""
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".html").write_text(as_html(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
