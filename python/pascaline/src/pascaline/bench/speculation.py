"""What an engine's speculation did during a run, from its metrics page before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from pascaline.bench.server import page
from pascaline.engines import ENGINES
from pascaline.errors import MissingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.bench.stream import Endpoint
    from pascaline.engines.series import Selector

FIELDS = ("drafted", "accepted", "checks", "won")
"""Of `engines.series.Series`: tokens, tokens, checks of one request's drafts, seconds."""


def read_speculation(endpoint: Endpoint, engine: str) -> dict[str, float]:
    """Return the totals so far, by `FIELDS`; without those that the engine, or its page now, does not have."""
    series = ENGINES[engine].series if engine in ENGINES else None
    selectors = {field: getattr(series, field, None) for field in FIELDS}
    wanted = {field: selector for field, selector in selectors.items() if selector is not None}
    if not wanted:
        return {}
    try:
        status, text = page(endpoint, "/metrics")
        return _totals(text, wanted) if status == 200 else {}
    except (MissingError, ValueError):  # a run is worth more than these figures
        return {}


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return what happened between two readings; a total that was absent before its first use was 0."""
    return {field: value - before.get(field, 0.0) for field, value in after.items()}


def _totals(text: str, wanted: Mapping[str, Selector]) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for field, selector in wanted.items():
                if sample.name == selector.name and selector.labels.items() <= sample.labels.items():
                    found[field] = found.get(field, 0.0) + sample.value
    return found
