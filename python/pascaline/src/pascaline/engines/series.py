"""The series of an engine's /metrics that mean the same for every engine, by the names that it gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pascaline.engines.exposition import MalformedPageError, Samples

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


@dataclass(frozen=True, slots=True)
class Selector:
    """A name, and a label that a series must have, if any."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    """At most one."""

    def sum(self, samples: Samples) -> float | None:
        """Return the sum of the series; None if there are none."""
        label = next((f'{key}="{value}"' for key, value in self.labels.items()), "")
        return samples.sum(self.name, label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """An engine's series; None if it has no series with this meaning."""

    running: Selector
    """Requests that are being computed."""
    queued: Selector
    """Requests that wait."""
    generated: Selector
    """Tokens generated, a counter."""
    throughput: Selector
    """Tokens generated per second."""
    drafted: Selector | None = None
    """Tokens that were drafted and verified, a counter."""
    accepted: Selector | None = None
    """Those that were right."""
    checks: Selector | None = None
    """Checks of one request's drafts in one step, a counter."""
    won: Selector | None = None
    """Seconds that speculation has won, less what it has lost."""
    kv_usage: Selector | None = None
    """Used share of the KV pool."""
    ttft: str | None = None
    """Histogram of the time to first token, seconds."""
    itl: str | None = None
    """Histogram of the gap between two tokens, seconds."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What people look at while an engine serves; None: the engine does not report it. Counters run since its start."""

    generated: float | None = None
    """Tokens."""
    ttft_seconds: float | None = None
    """Sum of the times to first token."""
    ttft_count: float | None = None
    """Number of those."""
    kv_ratio: float | None = None
    """Share of the KV cache in use."""


def samples_of(page: str, series: Series, names: Collection[str]) -> Samples | None:
    """Read series, those of running requests among them, from an engine's /metrics.

    None if the page is malformed, or has none of running requests: it is no engine's page.
    """
    try:
        samples = Samples(page, names)
    except MalformedPageError:
        return None
    return samples if samples.sum(series.running.name) is not None else None


def vitals_of(page: str, series: Series) -> Vitals:
    """Read what people look at from an engine's /metrics; nothing from a malformed page."""
    total, count = (Selector(f"{series.ttft}_{end}") if series.ttft else None for end in ("sum", "count"))
    wanted = (series.generated, total, count, series.kv_usage)
    try:
        samples = Samples(page, {selector.name for selector in wanted if selector})
    except MalformedPageError:
        return Vitals()
    return Vitals(*(selector.sum(samples) if selector else None for selector in wanted))
