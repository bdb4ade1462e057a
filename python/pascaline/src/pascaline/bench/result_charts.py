"""The charts of each benchmark, made from its results."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pascaline.bench.claims import claims_beside
from pascaline.bench.metrics import METRICS, readable
from pascaline.bench.svg_chart import Chart, Mark, Series, bar_chart, line_chart, pareto_front

if TYPE_CHECKING:
    from collections.abc import Sequence

AXES = {
    "batch": "concurrent requests",
    "context": "context, tokens",
    "serve": "requests/s sent",
    "quant": "type of the weights",
}
GUIDE_NAME, PLAN_NAME, ROOFLINE_NAME = "guide's claim (7B, P4)", "plan's estimate", "roofline of the card"


def charts(document: dict[str, Any]) -> list[str]:
    """Return the charts as SVG; those without data are left out."""
    if document["kind"] == "quant":
        return _quant_charts(document)
    makers = {
        "batch": (_throughput, _latency, _token_latency, _pareto, _memory),
        "context": (_ttft, _throughput, _token_latency, _memory),
        "serve": (_throughput, _latency, _token_latency, _pareto),
    }
    made = [maker(document) for maker in makers[document["kind"]]]
    return [chart for chart in made if chart]


def _throughput(document: dict[str, Any]) -> str:
    return _with_references(document, "output_throughput", "Throughput")


def _memory(document: dict[str, Any]) -> str:
    return _with_references(document, "gpu_memory_bytes", "GPU memory") or _with_references(
        document, "host_memory_bytes", "Main memory of the engine"
    )


def _ttft(document: dict[str, Any]) -> str:
    return _with_references(document, "ttft_p50", "Time to first token")


def _latency(document: dict[str, Any]) -> str:
    return _several(document, ("ttft_p50", "ttft_p99", "e2e_p50", "e2e_p99"), "Latency of requests")


def _token_latency(document: dict[str, Any]) -> str:
    return _several(document, ("itl_p50", "itl_p90", "itl_p99"), "Inter-token latency")


def _with_references(document: dict[str, Any], key: str, title: str) -> str:
    """Return a chart of one figure, with the guide's claim, the plan's estimate and the card's roofline beside it."""
    entries = _measured(document, key)
    if not entries:
        return ""
    metric = readable(METRICS[key], _values(document, key))
    axes = [_axis(document, entry["name"]) for entry in document["points"]]
    claims = claims_beside(document, key)
    expected = (document.get("reference") or {}).get("points", {})
    series = [Series("measured", _marks(document, key, metric.factor))]
    for name, values in (
        (GUIDE_NAME, [claims.get(axis) for axis in axes]),
        (PLAN_NAME, [_expected(expected, entry["name"], "plan", key) for entry in document["points"]]),
        (ROOFLINE_NAME, [_expected(expected, entry["name"], "roofline", key) for entry in document["points"]]),
    ):
        marks = [Mark(n, value * metric.factor) for n, value in enumerate(values) if value is not None]
        if marks:
            series.append(Series(name, marks, dashed=True))
    return line_chart(Chart(title, AXES[document["kind"]], f"{metric.title}, {metric.unit}", series, _names(document)))


def _several(document: dict[str, Any], keys: Sequence[str], title: str) -> str:
    found = [key for key in keys if _measured(document, key)]
    if not found:
        return ""
    shown = readable(METRICS[found[0]], [value for key in found for value in _values(document, key)])
    series = [Series(METRICS[key].title, _marks(document, key, shown.factor)) for key in found]
    return line_chart(Chart(title, AXES[document["kind"]], shown.unit, series, _names(document)))


def _pareto(document: dict[str, Any]) -> str:
    """Return throughput against latency: further left and higher is better."""
    speed, latency = METRICS["output_throughput"], readable(METRICS["e2e_p50"], _values(document, "e2e_p50"))
    marks = [
        Mark(
            entry["summary"]["e2e_p50"]["value"] * latency.factor,
            entry["summary"]["output_throughput"]["value"] * speed.factor,
            label=entry["name"],
        )
        for entry in _measured(document, "e2e_p50")
    ]
    if not marks:
        return ""
    front = pareto_front(marks, lambda a, b: a.x <= b.x and a.y >= b.y and (a.x, a.y) != (b.x, b.y))
    front = [replace(mark, label="") for mark in front]
    series = [Series("measured", marks, joined=False), Series("Pareto front", front, dashed=True)]
    return line_chart(
        Chart("Throughput against latency", f"{latency.title}, {latency.unit}", "output tokens/s", series)
    )


def _quant_charts(document: dict[str, Any]) -> list[str]:
    types = [entry for entry in document["types"] if entry.get("file_bytes")]
    names = [entry["name"] for entry in types]
    made = []
    for title, unit, columns in (
        (
            "Size",
            "GiB",
            (("file", "file_bytes"), ("planned memory", "planned_bytes"), ("measured memory", "memory_bytes")),
        ),
        ("KL divergence from the highest precision", "nats per token", (("mean KL", "kl_mean"),)),
        ("Perplexity", "perplexity", (("perplexity", "perplexity"),)),
    ):
        factor = 2**-30 if unit == "GiB" else 1.0
        series = [_column(name, types, key, factor) for name, key in columns]
        series = [each for each in series if each.marks]
        if series:
            made.append(bar_chart(Chart(title, AXES["quant"], unit, series, names)))
    return [*made, *_quant_speed(document, names)]


def _quant_speed(document: dict[str, Any], names: list[str]) -> list[str]:
    """Return tokens/s per type and batch size, and the guide's claims."""
    rates = {
        entry["name"]: entry["summary"]["output_throughput"]["value"]
        for entry in document["points"]
        if "output_throughput" in entry["summary"]
    }
    sizes = sorted({name.rpartition(" ")[2] for name in rates}, key=int)
    if not sizes:
        return []
    series = [
        Series(f"batch {size}", _known_marks([rates.get(f"{name} batch {size}") for name in names])) for size in sizes
    ]
    series += _quant_limits(document, names, f"batch {sizes[0]}")
    return [bar_chart(Chart("Speed", AXES["quant"], "output tokens/s", series, names))]


def _quant_limits(document: dict[str, Any], names: list[str], point: str) -> list[Series]:
    """Return the guide's claims, and plan and roofline at a point, for the types for which they are known."""
    claims = claims_beside(document, "output_throughput")
    points = (document.get("reference") or {}).get("points", {})
    limits = {GUIDE_NAME: [claims.get(name) for name in names]}
    for words, source in ((PLAN_NAME, "plan"), (ROOFLINE_NAME, "roofline")):
        limits[f"{words}, {point}"] = [
            _expected(points, f"{name} {point}", source, "output_throughput") for name in names
        ]
    return [Series(words, marks, dashed=True) for words, values in limits.items() if (marks := _known_marks(values))]


def _known_marks(values: Sequence[float | None]) -> list[Mark]:
    return [Mark(n, value) for n, value in enumerate(values) if value is not None]


def _column(name: str, types: list[dict[str, Any]], key: str, factor: float) -> Series:
    values = [entry.get(key) for entry in types]
    return Series(name, _known_marks([None if value is None else value * factor for value in values]))


def _measured(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [entry for entry in document["points"] if key in entry["summary"]]


def _values(document: dict[str, Any], key: str) -> list[float]:
    return [entry["summary"][key]["value"] for entry in _measured(document, key)]


def _marks(document: dict[str, Any], key: str, factor: float) -> list[Mark]:
    marks = []
    for n, entry in enumerate(document["points"]):
        if found := entry["summary"].get(key):
            # No figure is negative, so no interval goes below zero.
            low, high = (None if found[end] is None else max(0.0, found[end] * factor) for end in ("low", "high"))
            marks.append(Mark(n, found["value"] * factor, low, high))
    return marks


def _names(document: dict[str, Any]) -> list[str]:
    return [f"{_axis(document, entry['name']):g}" for entry in document["points"]]


def _axis(document: dict[str, Any], name: str) -> float:
    return next(float(point["axis"]) for point in document["experiment"]["points"] if point["name"] == name)


def _expected(points: dict[str, Any], name: str, source: str, key: str) -> float | None:
    value = points.get(name, {}).get(source, {}).get(key)
    return None if value is None else float(value)
