"""Results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pascaline.bench.figures import FIGURES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pascaline.bench.figures import Figure

COLUMNS = {
    "output_throughput": "tok/s out",
    "input_throughput": "tok/s in",
    "request_throughput": "req/s",
    "ttft_p50": "TTFT p50",
    "ttft_p99": "p99",
    "itl_p50": "ITL p50",
    "itl_p99": "p99",
    "e2e_p50": "E2E p50",
    "e2e_p99": "p99",
    "error_ratio": "errors %",
    "gpu_memory_bytes": "GPU GiB",
    "host_memory_bytes": "host GiB",
    "gpu_utilization_ratio": "busy %",
    "power_watts": "W",
    "tokens_per_joule": "tok/J",
}


def shown(figure: Figure, value: float) -> str:
    """Return a value in the figure's unit, without the unit."""
    return f"{value * figure.factor:.{figure.digits}f}"


def with_interval(figure: Figure, summary: dict[str, Any]) -> str:
    """Return a value with half the width of its interval, where it has one."""
    text = shown(figure, summary["value"])
    if summary["low"] is None:
        return text
    half = (summary["high"] - summary["low"]) / 2
    return f"{text} ± {shown(figure, half)}"


def results_table(document: dict[str, Any]) -> str:
    """Return the points as rows. Figures that no point has are left out; latencies are in ms, ± 95 % interval."""
    measured = [entry for entry in document["points"] if entry["summary"]]
    keys = [key for key in COLUMNS if any(key in entry["summary"] for entry in measured)]
    if "error_ratio" in keys and not any(entry["summary"]["error_ratio"]["value"] for entry in measured):
        keys.remove("error_ratio")
    rows = [["", *(COLUMNS[key] for key in keys)]]
    for entry in document["points"]:
        if entry["skipped"]:
            rows.append([entry["name"], f"skipped: {entry['skipped']}"])
        elif entry["summary"]:
            rows.append([entry["name"], *(_cell(key, entry["summary"]) for key in keys)])
    return "\n".join(aligned(rows))


def aligned(rows: list[list[str]]) -> Iterator[str]:
    """Yield rows with columns of equal width, the first to the left; a row of two cells spans the rest."""
    columns = max(map(len, rows), default=0)
    full = [row for row in rows if len(row) == columns]
    widths = [max(len(row[n]) for row in full) for n in range(columns)]
    if widths:
        widths[0] = max(len(row[0]) for row in rows)
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [
            cell.rjust(width) if len(row) == columns else cell for cell, width in zip(row[1:], widths[1:], strict=False)
        ]
        yield "  ".join(cells).rstrip()


def _cell(key: str, summary: dict[str, Any]) -> str:
    if key not in summary:
        return "-"
    precise = {"output_throughput", "ttft_p50", "itl_p50"}
    return with_interval(FIGURES[key], summary[key]) if key in precise else shown(FIGURES[key], summary[key]["value"])
