"""Results as one HTML file that loads nothing: no script, font or picture from outside."""

from __future__ import annotations

import html
import time
from typing import TYPE_CHECKING, Any

from pascaline.bench.claims import guide_applies
from pascaline.bench.expectations import expectations, throughputs
from pascaline.bench.html_page import page
from pascaline.bench.metrics import METRICS, readable
from pascaline.bench.result_charts import charts
from pascaline.bench.results import REPORT_NAME
from pascaline.bench.results_table import ABSENT, quality_rows, shown
from pascaline.errors import StorageError
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pascaline.bench.expectations import Throughput
    from pascaline.bench.metrics import Metric
    from pascaline.bench.results import Results

TITLES = {"batch": "Batch sweep", "context": "Context sweep", "serve": "Arrival rates", "quant": "Types of weights"}

_STYLE = """h1:not(:first-child) { margin-top: 4rem; }
td, th { white-space: nowrap; } td:first-child, th:first-child { position: sticky; left: 0; background: inherit; }
.scroll { margin: .75rem 0; } .scroll, .scroll table, .scroll tr { background: inherit; }
dl { border: 1px solid #8884; border-radius: 8px; }
.scroll, dl { background: light-dark(#fff, #181f1d); } tr:last-child td { border-bottom: 0; }
small { color: light-dark(#56645f, #9caba5); }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: .3rem 1.25rem; }
dl { padding: 1rem; }
dt { color: light-dark(#56645f, #9caba5); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .5rem; } }
"""


def write_report(results: Results) -> Path:
    """Write the report beside the results and return its path."""
    path = results.folder / REPORT_NAME
    write_page(path, [results.document])
    return path


def write_page(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """Write one page with several results."""
    try:
        path.write_text(render(*documents), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"failed to write {path}: {error.strerror}") from error


def render(*documents: dict[str, Any]) -> str:
    """Return the page, with a section for each result."""
    sections = (part for document in documents for part in _section(document))
    return page("; ".join(map(_title, documents)), sections, _STYLE)


def _title(document: dict[str, Any]) -> str:
    return f"{TITLES[document['kind']]}: {_model_words(document)}"


def _section(document: dict[str, Any]) -> list[str]:
    return [
        f"<h1>{html.escape(_title(document))}</h1>",
        f"<p>{html.escape(_where(document))}</p>",
        _incomplete(document),
        f'<div class="charts">{"".join(charts(document))}</div>',
        "<h2>Figures</h2>",
        "<p><small>Small: 95 % confidence interval. Latencies pool the requests of all runs (bootstrap over runs and "
        "requests), other figures are means over runs (Student's t). TTFT: time to first token; ITL: gap between "
        "tokens; TPOT: mean time per token after the first; E2E: whole answer.</small></p>",
        _metrics(document),
        *_quality(document),
        *_beside_expectations(document),
        "<h2>How it was measured</h2>",
        _description(document),
    ]


def _incomplete(document: dict[str, Any]) -> str:
    return "" if document["complete"] else "<p><strong>Interrupted: only the finished runs are shown.</strong></p>"


def _model_words(document: dict[str, Any]) -> str:
    model = (document.get("instance") or {}).get("server", {}).get("model")
    return str(model or document["experiment"].get("model", ""))


def _where(document: dict[str, Any]) -> str:
    machine, server = document.get("machine", {}), (document.get("instance") or {}).get("server", {})
    card = ", ".join(machine.get("gpus", [])) or machine.get("cpu", "")
    engine = f"{server.get('engine', '')} {server.get('engine_version') or ''}".strip()
    driver = f"driver {machine['driver']}" if machine.get("driver") else ""
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(document["updated"]))
    version = f"pascaline {machine.get('pascaline', '')} {machine.get('revision', '')}".strip()
    return " · ".join(part for part in (card, driver, engine, version, day) if part)


def _metrics(document: dict[str, Any]) -> str:
    entries = document["points"]
    rows = [["", *(entry["name"] for entry in entries)]]
    for key, metric in METRICS.items():
        if any(key in entry["summary"] for entry in entries):
            values = [entry["summary"][key]["value"] for entry in entries if key in entry["summary"]]
            metric = readable(metric, values)
            rows.append([f"{metric.title}, {metric.unit}", *(_cell(metric, entry) for entry in entries)])
    return _table(rows)


def _cell(metric: Metric, entry: dict[str, Any]) -> str:
    key, found = metric.key, entry["summary"].get(metric.key)
    if found is None:
        return html.escape(f"skipped: {entry['skipped']}") if entry["skipped"] and key == "output_throughput" else "-"
    text = shown(metric, found["value"])
    if found["low"] is None:
        return text
    return f"{text}<br><small>{shown(metric, max(0.0, found['low']))} … {shown(metric, found['high'])}</small>"


def _quality(document: dict[str, Any]) -> list[str]:
    """Return size and quality per type of weights."""
    if document["kind"] != "quant":
        return []
    rows = [[html.escape(cell) for cell in row] for row in quality_rows(document)]
    note = html.escape(str(document.get("quality_note", "")))
    return ["<h2>Size and quality</h2>", _table(rows), f"<p><small>{note}</small></p>"]


def _beside_expectations(document: dict[str, Any]) -> list[str]:
    """Return throughput beside the guide's claim, the plan's estimate and the roofline."""
    guide = [[html.escape(row.name), f"{row.measured:.1f}", f"{row.claim:.1f}"] for row in expectations(document)]
    return [
        "<h2>Held against</h2>",
        _throughputs(throughputs(document)),
        _table([["", "measured", "guide expects"], *guide]) if guide else "",
        f"<p><small>{html.escape(_expectation_notes(document, has_latency=bool(guide)))}</small></p>",
    ]


def _throughputs(points: Sequence[Throughput]) -> str:
    """Return the table of measured points; empty if no point has a reference."""
    if all((point.claim, point.plan, point.roofline) == (None, None, None) for point in points):
        return ""
    rows = [["", "measured tok/s", "guide claims", "plan expects", "roofline", "of the roofline"]]
    for point in points:
        cells = [ABSENT if value is None else f"{value:.1f}" for value in (point.claim, point.plan, point.roofline)]
        share = f"{point.measured / point.roofline:.0%}" if point.roofline else ABSENT
        rows.append([html.escape(point.name), f"{point.measured:.1f}", *cells, share])
    return _table(rows)


def _expectation_notes(document: dict[str, Any], *, has_latency: bool) -> str:
    """Return what the reader must know about the claims and estimates."""
    note = (document.get("reference") or {}).get("note")
    applies = "floors, not goals." if guide_applies(document) else "they are not shown beside another model or card."
    return " ".join(
        [
            *([f"{note}."] if note else []),
            f"The guide's figures are for a 7B model on a Tesla P4: {applies}",
            *(["The guide does not say which latency its 200 ms are."] if has_latency else []),
        ]
    )


def _description(document: dict[str, Any]) -> str:
    facts: dict[str, Any] = {}
    for key in ("experiment", "machine", "instance"):
        facts |= {f"{key}: {name}": value for name, value in (document.get(key) or {}).items() if value is not None}
    plan = document.get("plan")
    if plan:
        facts["plan: memory"] = f"{format_bytes(plan['total_bytes'])} of {format_bytes(plan['card_bytes'])}"
    facts["schema"] = document["schema"]
    items = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(_words(value))}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return str(value)


def _table(rows: Sequence[Iterable[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
