"""Percentiles, confidence intervals and significance.

Not scipy: with numpy it takes 200 MB, and the control plane needs neither for anything else.

The requests of one run share a server, so they are not independent. Intervals therefore come from a two-level bootstrap
(runs, then the requests of each run), and a comparison takes the run as its unit: Welch's t-test on one figure per run.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.95
RESAMPLES = 1000
MIN_RESAMPLES = 200
RESAMPLED_VALUES = 4_000_000
"""Most values that all resamples sort together: a few seconds of work. More values get fewer resamples."""
BOOTSTRAP_SEED = 20241
"""Fixed, so that the same results always give the same report."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its confidence interval; both ends are None if there are too few runs."""

    value: float
    low: float | None = None
    high: float | None = None


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile `share`, linear between neighbours. ordered: ascending, not empty."""
    position = (len(ordered) - 1) * share
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean over runs with Student's interval."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    half = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Estimate(mean, mean - half, mean + half)


def percentile_estimates(runs: Sequence[Sequence[Sequence[float]]], shares: Sequence[float]) -> list[Estimate]:
    """Return percentiles over all values, each with its bootstrap interval.

    runs: per run, per request, the values of that request (one for TTFT, many for inter-token latency); not all empty.
    """
    everything = sorted(number for run in runs for request in run for number in request)
    values = [percentile(everything, share) for share in shares]
    if sum(map(len, runs)) < 2:
        return [Estimate(value) for value in values]
    source = random.Random(BOOTSTRAP_SEED)  # noqa: S311 - no secret
    resampled: list[list[float]] = [[] for _ in shares]
    for _ in range(max(MIN_RESAMPLES, min(RESAMPLES, RESAMPLED_VALUES // len(everything)))):
        chosen = [request for run in source.choices(runs, k=len(runs)) for request in source.choices(run, k=len(run))]
        ordered = sorted(number for request in chosen for number in request)
        for found, share in zip(resampled, shares, strict=True):
            found.append(percentile(ordered, share))
    return [Estimate(value, *_interval(found)) for value, found in zip(values, resampled, strict=True)]


def _interval(found: list[float]) -> tuple[float, float]:
    found.sort()
    tail = (1 - CONFIDENCE) / 2
    return percentile(found, tail), percentile(found, 1 - tail)


@dataclass(frozen=True, slots=True)
class Difference:
    """How two sets of runs differ in one figure."""

    ratio: float | None
    """Mean of the second over mean of the first; None if the first is 0."""
    p_value: float | None
    """Chance of a difference at least this large if there were none; None with fewer than two runs on a side."""


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare the means of two samples whose variances may differ (Welch's t-test, two-sided)."""
    mean_a, mean_b = fmean(first), fmean(second)
    ratio = mean_b / mean_a if mean_a else None
    if len(first) < 2 or len(second) < 2:
        return Difference(ratio, None)
    part_a, part_b = variance(first) / len(first), variance(second) / len(second)
    if part_a + part_b == 0:
        return Difference(ratio, 1.0 if mean_a == mean_b else 0.0)
    t = (mean_b - mean_a) / math.sqrt(part_a + part_b)
    freedom = (part_a + part_b) ** 2 / (part_a**2 / (len(first) - 1) + part_b**2 / (len(second) - 1))
    return Difference(ratio, 2 * (1 - student_cdf(abs(t), freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm's step-down), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = highest
    return corrected


def student_cdf(t: float, freedom: float) -> float:
    """Return P(T <= t) of Student's distribution."""
    tail = _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2
    return 1 - tail if t > 0 else tail


def student_quantile(share: float, freedom: float) -> float:
    """Return t with P(T <= t) = share, for a share of at least one half."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function (Lentz's continued fraction; Abramowitz and Stegun 26.5.8)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d, value = 1.0, 0.0, 1.0
    for step in range(400):
        m = step // 2
        if step == 0:
            numerator = 1.0
        elif step % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _away_from_zero(1 + numerator * d)
        c = _away_from_zero(1 + numerator / c)
        value *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (value - 1) / a


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
