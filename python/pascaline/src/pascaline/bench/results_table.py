"""Results as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pascaline.bench.expectations import throughputs
from pascaline.bench.metrics import METRICS
from pascaline.text_table import GAP, LEFT, RIGHT, Column, table_lines
from pascaline.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.bench.metrics import Metric

ABSENT = "-"
"""Shown for an unknown value, which is not zero."""
WIDTH = 80
"""Characters of a terminal."""
COLUMNS = {
    "output_throughput": "tok/s out",
    "input_throughput": "tok/s in",
    "request_throughput": "req/s",
    "ttft_p50": "TTFT ms p50",
    "ttft_p90": "TTFT p90",
    "ttft_p99": "TTFT p99",
    "itl_p50": "ITL ms p50",
    "itl_p90": "ITL p90",
    "itl_p99": "ITL p99",
    "e2e_p50": "E2E ms p50",
    "e2e_p90": "E2E p90",
    "e2e_p99": "E2E p99",
    "accepted_ratio": "drafts %",
    "accept_length": "per check",
    "won_seconds": "won s",
    "error_ratio": "errors %",
    "gpu_memory_bytes": "GPU GiB",
    "host_memory_bytes": "host GiB",
    "gpu_utilization_ratio": "busy %",
    "power_watts": "W",
    "tokens_per_joule": "tok/J",
}


def shown(metric: Metric, value: float) -> str:
    """Return a value in the metric's unit, without the unit."""
    return f"{value * metric.factor:.{metric.digits}f}"


def with_interval(metric: Metric, summary: dict[str, Any]) -> str:
    """Return a value with half the width of its interval, if it has one."""
    text = shown(metric, summary["value"])
    if summary["low"] is None:
        return text
    half = (summary["high"] - summary["low"]) / 2
    return f"{text} ± {shown(metric, half)}"


EXPECTED_HEADING = ("guide", "plan", "roofline")
QUALITY_HEADING = (
    "",
    "file",
    "bits/weight",
    "planned memory",
    "measured memory",
    "perplexity",
    "mean KL",
    "same top token",
    "perplexity served",
    "KL served, at least",
)


def results_table(document: dict[str, Any], width: int = WIDTH) -> str:
    """Return the points as rows, in tables of at most `width` characters.

    Figures that no point has are left out; latencies are in ms, ± 95 % interval. The last columns are the guide's
    claim, the plan's estimate and the card's roofline, in output tokens/s.
    """
    summaries = {entry["name"]: entry["summary"] for entry in document["points"] if entry["summary"]}
    keys = _shown_keys(list(summaries.values()))
    heading, expected = _expected_columns(document)
    rows = [["", *(COLUMNS[key] for key in keys), *heading]]
    for name, summary in summaries.items():
        rows.append([name, *(_cell(key, summary) for key in keys), *expected[name]])
    skipped = [[entry["name"], f"skipped: {entry['skipped']}"] for entry in document["points"] if entry["skipped"]]
    tables = [*_quality_tables(document, width), *folded(rows, skipped, width)]
    return "\n\n".join("\n".join(lines) for lines in tables)


def _shown_keys(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Return the columns that some point has; errors only if there are any."""
    return [
        key
        for key in COLUMNS
        if any(key in each and (key != "error_ratio" or each[key]["value"]) for each in summaries)
    ]


def _expected_columns(document: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Return what is known of claim, plan and roofline: the headings, and the cells by the point's name."""
    limits = {each.name: (each.claim, each.plan, each.roofline) for each in throughputs(document)}
    known = [n for n in range(len(EXPECTED_HEADING)) if any(values[n] is not None for values in limits.values())]
    cells = {name: [_rate(values[n]) for n in known] for name, values in limits.items()}
    return [EXPECTED_HEADING[n] for n in known], cells


def _rate(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _quality_tables(document: dict[str, Any], width: int) -> list[list[str]]:
    if document["kind"] != "quant":
        return []
    rows = quality_rows(document)
    measured = [row for row in rows if len(row) == len(rows[0])]
    return folded(measured, [row for row in rows if row not in measured], width)


def folded(rows: list[list[str]], reasons: list[list[str]], width: int = WIDTH) -> list[list[str]]:
    """Return the lines of the rows, as tables of at most `width` characters that all begin with the first column.

    reasons: names of what has no figures, and why; they follow the first table. A column that is too wide for any
    table has one to itself.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    groups, used = list[list[int]](), width
    for n, wide in enumerate(widths[1:], 1):
        if not groups or used + GAP + wide > width:
            groups.append([])
            used = widths[0]
        groups[-1].append(n)
        used += GAP + wide
    tables = [
        table_lines([[row[0], *(row[n] for n in group)] for row in rows], [LEFT, *(RIGHT for _ in group)])
        for group in groups
    ]
    first, *others = tables or [[]]
    return [first + table_lines(reasons, [Column(min_width=widths[0]), LEFT]), *others]


def quality_rows(document: dict[str, Any]) -> list[list[str]]:
    """Return a heading, and the size and quality of each type of weights. Columns without a value are left out."""
    heading = list(QUALITY_HEADING)
    rows = [heading, *(_quality_row(entry) for entry in document["types"])]
    measured = [row for row in rows[1:] if len(row) == len(heading)]
    kept = [n for n in range(len(heading)) if n == 0 or any(row[n] != ABSENT for row in measured)]
    return [[row[n] for n in kept] if len(row) == len(heading) else row for row in rows]


def _quality_row(entry: dict[str, Any]) -> list[str]:
    def size(key: str) -> str:
        return format_bytes(entry[key]) if entry.get(key) is not None else ABSENT

    def plain(key: str, digits: int) -> str:
        return f"{entry[key]:.{digits}f}" if entry.get(key) is not None else ABSENT

    if entry.get("skipped") and "file_bytes" not in entry:
        return [entry["name"], f"skipped: {entry['skipped']}"]
    error = f" ± {entry['perplexity_error']:.3f}" if entry.get("perplexity_error") is not None else ""
    return [
        entry["name"],
        size("file_bytes"),
        plain("bits_per_weight", 2),
        size("planned_bytes"),
        size("memory_bytes"),
        plain("perplexity", 3) + error,
        plain("kl_mean", 5),
        f"{entry['same_top']:.2%}" if entry.get("same_top") is not None else ABSENT,
        plain("served_perplexity", 3),
        plain("served_kl_least", 5),
    ]


def _cell(key: str, summary: dict[str, Any]) -> str:
    if key not in summary:
        return ABSENT
    precise = {"output_throughput", "ttft_p50", "itl_p50"}
    return with_interval(METRICS[key], summary[key]) if key in precise else shown(METRICS[key], summary[key]["value"])
