"""Speeds with experts in the host's memory that were published, against what the estimate gives for them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from pascaline.engines import ENGINES, engine_named
from pascaline.engines.plan_request import PlanRequest
from pascaline.planning.catalog import catalog_spec, shapes
from pascaline.planning.mixtures import requantized
from pascaline.planning.speed import cpu_rate
from pascaline.planning.weights import weights_on_device

if TYPE_CHECKING:
    from pascaline.engines.data import HybridPoint
    from pascaline.engines.memory_model import Weights
    from pascaline.models.spec import ModelSpec

ENGINE = next(name for name, engine in ENGINES.items() if engine.keeps_weights_on_host)
"""All points are of this engine."""
NEWER_CARD_SHARE = 0.35
"""Share of the bandwidth that decode of a mixture reaches on the cards of the points, all newer than Pascal: estimated,
between the 0.21 fitted on a P40 and the 0.58 of dense models."""


def hybrid_points() -> tuple[HybridPoint, ...]:
    """Return the points, in the order of engine.toml."""
    return engine_named(ENGINE).data.hybrid_points


@cache
def _spec(point: HybridPoint) -> ModelSpec:
    """Return the model of a point. Raises StopIteration if it is not in the catalogue."""
    spec = catalog_spec(next(shape for shape in shapes() if shape["name"] == point.model))
    return spec if point.file is None else requantized(spec, point.file)


@cache
def weights_of(point: HybridPoint) -> Weights:
    """Return what the card and the host of a point hold."""
    spec = _spec(point)
    request = PlanRequest(
        card_bytes=2**40, engine=ENGINE, context_length=4096, max_running_requests=1,
        expert_layers_on_host=min(point.expert_layers, spec.num_hidden_layers),
    )  # fmt: skip
    return weights_on_device(spec, request)


def device_seconds(point: HybridPoint) -> float:
    """Return the time of one decode step on the card: its bytes, or at least the launches of all layers."""
    assert point.card_bytes_per_second is not None
    least = engine_named(ENGINE).data.efficiency["least_seconds_per_layer"].value * _spec(point).num_hidden_layers
    return max(weights_of(point).read_bytes(1) / (point.card_bytes_per_second * NEWER_CARD_SHARE), least)


def host_seconds(point: HybridPoint) -> float:
    """Return the time of one decode step in which the host reads: what the card and the switches to it leave."""
    switch = engine_named(ENGINE).data.efficiency["host_switch_seconds"].value
    return 1 / point.tokens_per_second - device_seconds(point) - weights_of(point).host_switches * switch


def expected(point: HybridPoint) -> float:
    """Return the tokens per second that the estimate gives for a point, of an unknown host with the assumed memory."""
    known, weights = engine_named(ENGINE).data.efficiency, weights_of(point)
    if point.phase == "prefill":
        assert point.link_bytes_per_second is not None
        assert point.device_tokens_per_second is not None
        copied = weights.host_read_bytes(point.batch) / point.link_bytes_per_second
        return point.batch / (copied + point.batch / point.device_tokens_per_second)
    read = known["host_memory_bytes_per_second"].value
    if point.host_bytes_per_second is not None:
        read = point.host_bytes_per_second * known["host_peak_share"].value
    switches = weights.host_switches * known["host_switch_seconds"].value
    host = weights.host_read_bytes(1) / cpu_rate(read, point.host_cores, known)
    return 1 / (device_seconds(point) + switches + host)


def expected_range(point: HybridPoint) -> tuple[float, float]:
    """Return the range of tokens per second that a plan shows for a point: all of the time is the host's at worst."""
    known, estimate = engine_named(ENGINE).data.efficiency, expected(point)
    is_known = point.phase == "prefill" or point.host_bytes_per_second is not None
    error = known["host_error_known" if is_known else "host_error"].value
    return estimate * (1 - error), estimate * (1 + error)
