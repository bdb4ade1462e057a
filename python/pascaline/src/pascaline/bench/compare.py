"""Finds which differences between two results are more than chance.

The unit is the run, because the requests of one run share a server and are not independent. Welch's t-test compares the
figures of the runs, and Holm's method corrects for the number of comparisons. Two results of the same thing therefore
show no difference at all in 19 of 20 comparisons.
"""

from __future__ import annotations

from typing import Any

from pascaline.bench.metrics import METRICS
from pascaline.bench.results_table import shown
from pascaline.bench.statistics import CONFIDENCE, holm, welch
from pascaline.errors import ConfigurationError
from pascaline.text_table import LEFT, RIGHT, table_lines

COMPARED = (
    "output_throughput",
    "ttft_p50",
    "ttft_p99",
    "itl_p50",
    "itl_p99",
    "e2e_p50",
    "error_ratio",
    "gpu_memory_bytes",
    "host_memory_bytes",
    "power_watts",
    "tokens_per_joule",
)
LOAD = ("prompt_tokens", "output_tokens", "requests", "arrival")
"""Fields of experiment.Point, other than its place on the axis, that decide what is sent."""


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the differences at every point that both results have.

    Raises ConfigurationError if they have no point in common, or come from different benchmarks.
    """
    if first["kind"] != second["kind"]:
        raise ConfigurationError(
            f"results of bench {first['kind']} cannot be compared with those of bench {second['kind']}"
        )
    summaries = [
        {entry["name"]: entry["summary"] for entry in side["points"] if entry["summary"]} for side in (first, second)
    ]
    names = [name for name in summaries[0] if name in summaries[1]]
    if not names:
        raise ConfigurationError(
            f"the results share no point: one has {_listed(summaries[0])}, the other {_listed(summaries[1])}"
        )
    rows = [row for name in names for row in _rows(name, summaries[0][name], summaries[1][name])]
    _judge(rows)
    unlike = [*_unlike(first, second), *_unlike_loads(first, second, names)]
    return {"confidence": CONFIDENCE, "unlike": unlike, "rows": rows}


def comparison_table(differences: dict[str, Any]) -> str:
    """Return the differences as text; a significant one says which result is better."""
    lines = [f"not alike: {text}" for text in differences["unlike"]]
    table = [["", "", "A", "B", "B/A", "p", ""]]
    for row in differences["rows"]:
        metric = METRICS[row["figure"]]
        ratio = f"{row['ratio']:.3f}" if row["ratio"] is not None else "-"
        p_value = f"{row['p_value']:.3f}" if row["p_value"] is not None else "-"
        values = [f"{shown(metric, row[side])} {metric.unit}" for side in ("a", "b")]
        table.append([row["point"], metric.title, *values, ratio, p_value, row["verdict"]])
    return "\n".join([*lines, *table_lines(table, [LEFT, LEFT, RIGHT, RIGHT, RIGHT, RIGHT, LEFT])])


def _rows(name: str, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key in COMPARED:
        if key in first and key in second:
            found = welch(first[key]["runs"], second[key]["runs"])
            a, b = first[key]["value"], second[key]["value"]
            rows.append({"point": name, "figure": key, "a": a, "b": b, "ratio": found.ratio, "p_value": found.p_value})
    return rows


def _judge(rows: list[dict[str, Any]]) -> None:
    """Correct the p-values and add a verdict to each row."""
    testable = [row for row in rows if row["p_value"] is not None]
    for row, corrected in zip(testable, holm([row["p_value"] for row in testable]), strict=True):
        row["p_value"] = corrected
    for row in rows:
        row["verdict"] = _verdict(row)


def _verdict(row: dict[str, Any]) -> str:
    if row["p_value"] is None:
        return "unknown: one run cannot show what is chance; use --repeats 3 or more"
    if row["p_value"] >= 1 - CONFIDENCE:
        return "no significant difference"
    better = METRICS[row["figure"]].better
    larger = row["b"] > row["a"]
    if not better:
        return "B is higher" if larger else "B is lower"
    return "B is better" if larger == (better == "higher") else "B is worse"


def _unlike(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what differs between the two instances and machines."""
    found = []
    for words, path in (
        ("model", ("instance", "server", "model")),
        ("engine", ("instance", "server", "engine")),
        ("engine version", ("instance", "server", "engine_version")),
        ("engine settings", ("instance", "server", "settings")),
        ("settings given", ("instance", "settings")),
        ("GPUs", ("machine", "gpus")),
        ("CPU", ("machine", "cpu")),
        ("driver", ("machine", "driver")),
        ("seed", ("experiment", "seed")),
        ("pascaline", ("machine", "revision")),
    ):
        a, b = _lookup(first, path), _lookup(second, path)
        if a != b:
            found.append(f"{words}: {a} and {b}")
    return found


def _unlike_loads(first: dict[str, Any], second: dict[str, Any], names: list[str]) -> list[str]:
    """Return how the requests of the same point differ: a point's name gives their number, not their length."""
    found: dict[str, list[str]] = {}
    for name in names:
        a, b = _load_of(first, name), _load_of(second, name)
        for key in LOAD:
            if a.get(key) != b.get(key):
                found.setdefault(f"{key.replace('_', ' ')}: {a.get(key)} and {b.get(key)}", []).append(name)
    return [f"{words} ({', '.join(points)})" for words, points in found.items()]


def _load_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the experiment's point of that name. bench quant puts the type of the weights in front of the name."""
    points: list[dict[str, Any]] = document["experiment"]["points"]
    return next((point for point in points if name == point["name"] or name.endswith(f" {point['name']}")), {})


def _lookup(document: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        document = (document or {}).get(key)
    return document


def _listed(summaries: dict[str, Any]) -> str:
    return ", ".join(summaries) or "none"
