"""The load of an engine whose name is not known, from its /metrics."""

from __future__ import annotations

from dataclasses import dataclass

from pascaline.engines.registry import engines
from pascaline.engines.series import samples_of


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is doing."""

    running: float
    queued: float
    kv_usage: float
    """Used share of the KV pool; 0 if the engine does not report it."""


def load_of(page: str) -> Load | None:
    """Read the load from the /metrics of any engine; None if the page is of none, or malformed."""
    for engine in engines().values():
        series = engine.series
        names = [selector.name for selector in (series.running, series.queued, series.kv_usage) if selector]
        if (samples := samples_of(page, series, names)) is not None:
            usage = samples.total(series.kv_usage.name) if series.kv_usage else 0.0
            return Load(samples.total(series.running.name), samples.total(series.queued.name), usage)
    return None
