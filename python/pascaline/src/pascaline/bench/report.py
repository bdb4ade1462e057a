"""Results as one HTML file that loads nothing: no script, font or picture from outside."""

from __future__ import annotations

import html
import time
from typing import TYPE_CHECKING, Any

from pascaline.bench.charts import charts
from pascaline.bench.figures import FIGURES
from pascaline.bench.held import expectations, held_against
from pascaline.bench.results import REPORT_NAME
from pascaline.bench.table import ABSENT, quality_rows, shown
from pascaline.errors import StorageError
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pascaline.bench.results import Results

TITLES = {"batch": "Batch sweep", "context": "Context sweep", "serve": "Arrival rates", "quant": "Types of weights"}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts svg { max-width: 100%; height: auto; }
small { opacity: .7; } dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; overflow-wrap: anywhere; }
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
    title = "; ".join(map(_title, documents))
    head = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
    ]
    sections = [part for document in documents for part in _section(document)]
    return "\n".join(part for part in (*head, *sections, "</body></html>") if part) + "\n"


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
        _figures(document),
        *_quality(document),
        *_held_against(document),
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


def _figures(document: dict[str, Any]) -> str:
    entries = document["points"]
    rows = [["", *(entry["name"] for entry in entries)]]
    for key, figure in FIGURES.items():
        if any(key in entry["summary"] for entry in entries):
            rows.append([f"{figure.title}, {figure.unit}", *(_cell(key, entry) for entry in entries)])
    return _table(rows)


def _cell(key: str, entry: dict[str, Any]) -> str:
    found = entry["summary"].get(key)
    if found is None:
        return html.escape(f"skipped: {entry['skipped']}") if entry["skipped"] and key == "output_throughput" else "-"
    figure = FIGURES[key]
    text = shown(figure, found["value"])
    if found["low"] is None:
        return text
    return f"{text}<br><small>{shown(figure, found['low'])} … {shown(figure, found['high'])}</small>"


def _quality(document: dict[str, Any]) -> list[str]:
    """Return size and quality per type of weights."""
    if document["kind"] != "quant":
        return []
    rows = [[html.escape(cell) for cell in row] for row in quality_rows(document)]
    note = html.escape(str(document.get("quality_note", "")))
    return ["<h2>Size and quality</h2>", _table(rows), f"<p><small>{note}</small></p>"]


def _held_against(document: dict[str, Any]) -> list[str]:
    """Return throughput beside the guide's claim, the plan's estimate and the roofline."""
    rows = [["", "measured tok/s", "guide claims", "plan expects", "roofline", "of the roofline"]]
    for held in held_against(document):
        cells = [ABSENT if value is None else f"{value:.1f}" for value in (held.claim, held.plan, held.roofline)]
        share = f"{held.measured / held.roofline:.0%}" if held.roofline else ABSENT
        rows.append([html.escape(held.name), f"{held.measured:.1f}", *cells, share])
    note = (document.get("reference") or {}).get("note")
    notes = [f"{note}." if note else "", "The guide's figures are for a 7B model on a Tesla P4: floors, not goals."]
    expected = [["", "measured", "guide expects"]]
    expected += [[html.escape(row.name), f"{row.measured:.1f}", f"{row.claim:.1f}"] for row in expectations(document)]
    if len(expected) > 1:
        notes.append("The guide does not say which latency its 200 ms are.")
    return [
        "<h2>Held against</h2>",
        _table(rows),
        _table(expected) if len(expected) > 1 else "",
        f"<p><small>{html.escape(' '.join(each for each in notes if each))}</small></p>",
    ]


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
