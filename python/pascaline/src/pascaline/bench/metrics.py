"""The metrics of a benchmark: what each one is, and how it is computed from one run and from all runs of a point."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pascaline.bench.statistics import mean_estimate, percentile, percentile_estimates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pascaline.bench.load import Record
    from pascaline.bench.run_result import Run
    from pascaline.bench.statistics import Estimate

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, and how tables and plots show it."""

    key: str
    title: str
    unit: str
    better: Literal["higher", "lower", ""]
    """Empty if neither is better."""
    factor: float = 1.0
    """Multiplies the stored base unit to get the shown unit."""
    digits: int = 1


LONG_SECONDS = 10.0
"""From here on a duration is shown in seconds: 12345.6 ms say less than 12.35 s."""


def readable(metric: Metric, values: Iterable[float]) -> Metric:
    """Return the metric in the unit in which values, in its base unit, are read best: seconds if one is long."""
    if metric.unit == "ms" and max(values, default=0.0) >= LONG_SECONDS:
        return replace(metric, unit="s", factor=1.0, digits=2)
    return metric


def _latencies(key: str, title: str) -> list[Metric]:
    return [Metric(f"{key}_{name}", f"{title} {name}", "ms", "lower", 1e3) for name in PERCENTILES]


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("output_throughput", "output throughput", "tok/s", "higher"),
        Metric("input_throughput", "prompt throughput", "tok/s", "higher"),
        Metric("request_throughput", "request throughput", "1/s", "higher", digits=2),
        *_latencies("ttft", "TTFT"),
        *_latencies("itl", "ITL"),
        *_latencies("tpot", "TPOT"),
        *_latencies("e2e", "E2E"),
        Metric("error_ratio", "errors", "%", "lower", 100),
        Metric("gpu_memory_bytes", "GPU memory, peak", "GiB", "lower", 2**-30, 2),
        Metric("host_memory_bytes", "engine's host memory, peak", "GiB", "lower", 2**-30, 2),
        Metric("gpu_utilization_ratio", "GPU busy", "%", "", 100),
        Metric("power_watts", "power", "W", "lower"),
        Metric("tokens_per_joule", "output tokens/J", "tok/J", "higher", digits=3),
        Metric("accepted_ratio", "drafts that were right", "%", "higher", 100),
        Metric("accept_length", "tokens per check of drafts", "tokens", "higher", digits=2),
        Metric("won_seconds", "time won by speculation", "s", "higher"),
        Metric("generator_cpu_ratio", "generator's CPU", "% of a core", "", 100, 2),
        Metric("late_seconds", "sent late, most", "ms", "", 1e3),
    )
}
LATENCIES: dict[str, Callable[[Record], Sequence[float]]] = {
    "ttft": lambda record: [] if record.ttft is None else [record.ttft],
    "itl": lambda record: record.itl,
    "tpot": lambda record: [] if record.tpot is None else [record.tpot],
    "e2e": lambda record: [] if record.e2e is None else [record.e2e],
}


def metrics_of_run(run: Run) -> dict[str, float]:
    """Return every metric that this run has; a metric without data is absent, never zero."""
    good = [record for record in run.records if record.error is None]
    found = _throughputs(run, good) | _readings(run, good) | _speculation(run)
    for key, values_of in LATENCIES.items():
        ordered = sorted(value for record in good for value in values_of(record))
        if ordered:
            found |= {f"{key}_{name}": percentile(ordered, share) for name, share in PERCENTILES.items()}
    return found


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return each metric's value over all runs, the ends of its 95 % interval, and its value in each run.

    A latency pools the requests of all runs, and its interval is bootstrapped. Other figures are means over the runs.
    """
    per_run = [metrics_of_run(run) for run in runs]
    summary = {}
    for key in METRICS:
        values = [figures[key] for figures in per_run if key in figures]
        if values:
            summary[key] = asdict(mean_estimate(values)) | {"runs": values}
    for key, estimates in _latency_estimates(runs).items():
        summary[key] |= asdict(estimates)
    return summary


def _latency_estimates(runs: Sequence[Run]) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for key, values_of in LATENCIES.items():
        nested = [
            [values for record in run.records if record.error is None and (values := values_of(record))] for run in runs
        ]
        nested = [run for run in nested if run]
        if nested:
            estimates = percentile_estimates(nested, list(PERCENTILES.values()))
            found |= {f"{key}_{name}": estimate for name, estimate in zip(PERCENTILES, estimates, strict=True)}
    return found


def _throughputs(run: Run, good: Sequence[Record]) -> dict[str, float]:
    found: dict[str, float] = {}
    if run.records:
        found["error_ratio"] = 1 - len(good) / len(run.records)
    found["generator_cpu_ratio"] = run.cpu_seconds / run.seconds
    found["late_seconds"] = max((record.late for record in run.records), default=0.0)
    if good:
        found["output_throughput"] = sum(record.output_tokens for record in good) / run.seconds
        found["input_throughput"] = sum(record.prompt_tokens for record in good) / run.seconds
        found["request_throughput"] = len(good) / run.seconds
    return found


def _speculation(run: Run) -> dict[str, float]:
    """Return what drafts were worth; nothing without a check, and no time won where the engine does not measure it."""
    figures, found = run.speculation, {}
    if figures.get("drafted"):
        found["accepted_ratio"] = figures.get("accepted", 0.0) / figures["drafted"]
    if figures.get("checks"):
        found["accept_length"] = 1 + figures.get("accepted", 0.0) / figures["checks"]
        if "won" in figures:
            found["won_seconds"] = figures["won"]
    return found


def _readings(run: Run, good: Sequence[Record]) -> dict[str, float]:
    samples = run.samples
    found: dict[str, float] = {}
    for key, take in (
        ("gpu_memory_bytes", max),
        ("host_memory_bytes", max),
        ("gpu_utilization_ratio", fmean),
        ("power_watts", fmean),
    ):
        values = [value for sample in samples if (value := getattr(sample, key)) is not None]
        if values:
            found[key] = float(take(values))
    if found.get("power_watts"):
        found["tokens_per_joule"] = sum(r.output_tokens for r in good) / (found["power_watts"] * run.seconds)
    return found
