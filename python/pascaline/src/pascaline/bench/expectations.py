"""Sets measured throughput beside the guide's claim, the plan's estimate and the card's roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pascaline.bench.claims import EXPECTED, EXPECTED_BATCH, EXPECTED_LOAD_SECONDS, claims_beside, guide_applies
from pascaline.bench.metrics import METRICS, readable


@dataclass(frozen=True, slots=True)
class Throughput:
    """One point beside what was claimed and estimated for it, in output tokens per second; None if unknown."""

    name: str
    measured: float
    claim: float | None
    """The guide's claim, for a 7B model on a Tesla P4."""
    plan: float | None
    roofline: float | None


def throughputs(document: dict[str, Any]) -> list[Throughput]:
    """Return every measured point of a result with what was expected of it."""
    expected = (document.get("reference") or {}).get("points", {})
    found = []
    for entry in document["points"]:
        measured = entry["summary"].get("output_throughput")
        if measured:
            point = expected.get(entry["name"], {})
            limits = [point.get(source, {}).get("output_throughput") for source in ("plan", "roofline")]
            found.append(Throughput(entry["name"], measured["value"], _claim(document, entry["name"]), *limits))
    return found


@dataclass(frozen=True, slots=True)
class Expectation:
    """One figure that the guide expects beside the measured one, both in the unit that is shown."""

    name: str
    measured: float
    claim: float


def expectations(document: dict[str, Any]) -> list[Expectation]:
    """Return row 13 of the guide (four concurrent requests, and loading) beside the result, if that was measured.

    Nothing if the guide speaks of another model or card.
    """
    if not guide_applies(document):
        return []
    found = []
    name = f"batch {EXPECTED_BATCH}"
    summary: dict[str, Any] = next((point["summary"] for point in document["points"] if point["name"] == name), {})
    for key, claim in EXPECTED.items():
        if key in summary:
            metric = readable(METRICS[key], (summary[key]["value"],))
            words = f"{metric.title} at {name}, {metric.unit}"
            found.append(Expectation(words, summary[key]["value"] * metric.factor, claim * metric.factor))
    started = (document.get("instance") or {}).get("start_seconds")
    if started is not None:
        found.append(Expectation("from start to ready, s", started, EXPECTED_LOAD_SECONDS))
    return found


def _claim(document: dict[str, Any], name: str) -> float | None:
    """Return the guide's claim for a point: by its place on the axis; in bench quant by type, for one request."""
    claims = claims_beside(document, "output_throughput")
    if document["kind"] == "quant":
        kind, _, size = name.rpartition(" batch ")
        return claims.get(kind) if size == "1" else None
    axes = {point["name"]: point["axis"] for point in document["experiment"]["points"]}
    return claims.get(axes[name])
