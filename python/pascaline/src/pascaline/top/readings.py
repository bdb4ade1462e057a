"""What a host's pages report about its GPUs and instances, as named numbers. All functions are pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pascaline.engines import ENGINES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pascaline.engines.series import Selector, Series
    from pascaline.top.pages import HostPages, Page

_UNIT = re.compile(r"pascaline-(.+)\.service")
"""An instance's unit; the instance is named after it."""
# Reasons for lower clocks that are no problem.
_AS_WANTED = frozenset({"gpu_idle", "applications_clocks_setting", "display_clock_setting"})


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU now; None if the card does not report a value."""

    gpu: str
    uuid: str
    name: str
    lost: bool
    utilization_percent: float | None
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    temperature_celsius: float | None
    power_watts: float | None
    power_limit_watts: float | None
    throttle_reasons: tuple[str, ...] = ()
    """What lowers the clocks now, except idleness and settings."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Sum and count of a histogram since the engine started."""

    total_seconds: float
    count: float


@dataclass(frozen=True, slots=True)
class InstanceReading:
    """One instance now; None if neither agent nor engine reports a value."""

    name: str
    agent_port: int
    model: str | None
    state: str
    """The agent's name for the state, or `no agent`."""
    restarts: float | None
    running_requests: float | None
    queued_requests: float | None
    generated_tokens: float | None
    """Tokens generated since the engine started."""
    tokens_per_second: float | None
    """From the tokens between two readings; in a first reading, the engine's own gauge."""
    kv_cache_ratio: float | None
    planned_bytes: float | None
    actual_bytes: float | None
    ttft: Observed | None = None
    itl: Observed | None = None
    ttft_seconds: float | None = None
    """Mean time to first token between two readings, None without any; in a first reading, since the engine's start."""
    itl_seconds: float | None = None
    """The same for the gap between two tokens."""
    accepted_ratio: float | None = None
    """Share of the drafted tokens that were right since the engine started; None without any."""
    accept_length: float | None = None
    """Mean tokens that a check of a request's drafts gave, its own one included; None without any."""
    won_seconds: float | None = None
    """What speculation has won since the engine started; negative if it has lost; None if the engine does not say."""


@dataclass(frozen=True, slots=True)
class HostReading:
    """One host now."""

    host: str
    timestamp: float
    error: str | None
    """Why the host is unreachable; None if anything answered."""
    gpus: tuple[GpuReading, ...] = ()
    instances: tuple[InstanceReading, ...] = ()


def read_host(pages: HostPages, timestamp: float, before: HostReading | None = None) -> HostReading:
    """Return what the pages report; rates need the previous reading."""
    elapsed = timestamp - before.timestamp if before else 0.0
    earlier = {instance.agent_port: instance for instance in before.instances} if before else {}
    return HostReading(
        host=pages.host,
        timestamp=timestamp,
        error=pages.error,
        gpus=tuple(_gpus(pages.exporter)) if pages.exporter else (),
        instances=tuple(
            _instance(pages, port, agent, engine, earlier.get(port), elapsed)
            for port, (agent, engine) in pages.instances.items()
            if agent or engine
        ),
    )


def _gpus(page: Page) -> Iterable[GpuReading]:
    lost = {sample.labels["uuid"]: sample for sample in page.select("nvidia_gpu_lost")}
    infos = {sample.labels["uuid"]: sample.labels for sample in page.select("nvidia_gpu_info")}
    for uuid, sample in lost.items():
        yield GpuReading(
            gpu=sample.labels["gpu"],
            uuid=uuid,
            name=infos.get(uuid, {}).get("name", ""),
            lost=bool(sample.value),
            utilization_percent=page.total("nvidia_gpu_utilization_gpu", uuid=uuid),
            memory_used_bytes=page.total("nvidia_gpu_memory_used_bytes", uuid=uuid),
            memory_total_bytes=page.total("nvidia_gpu_memory_total_bytes", uuid=uuid),
            temperature_celsius=page.total("nvidia_gpu_temperature_gpu", uuid=uuid),
            power_watts=page.total("nvidia_gpu_power_draw", uuid=uuid),
            power_limit_watts=page.total("nvidia_gpu_power_limit_watts", uuid=uuid, limit="enforced"),
            throttle_reasons=tuple(
                sample.labels["reason"]
                for sample in page.select("nvidia_gpu_throttle_reason", uuid=uuid)
                if sample.value and sample.labels["reason"] not in _AS_WANTED
            ),
        )


def _instance(
    pages: HostPages,
    port: int,
    agent: Page | None,
    engine: Page | None,
    before: InstanceReading | None,
    elapsed: float,
) -> InstanceReading:
    series = _series_of(engine)
    generated = _selected(engine, series.generated) if series else None
    rate = _rate(generated, before.generated_tokens if before else None, elapsed)
    ttft = _observed(engine, series.ttft) if series else None
    itl = _observed(engine, series.itl) if series else None
    info = _labels(agent, "pascaline_settings_info")
    unit = _UNIT.fullmatch(info.get("unit", ""))
    name = unit[1] if unit else info.get("served_model_name") or f":{port}"
    return InstanceReading(
        name=name,
        agent_port=port,
        model=info.get("model"),
        state=_state(agent),
        restarts=_total(agent, "pascaline_engine_restarts_total"),
        running_requests=_selected(engine, series.running) if series else None,
        queued_requests=_selected(engine, series.queued) if series else None,
        generated_tokens=generated,
        tokens_per_second=_selected(engine, series.throughput) if series and rate is None else rate,
        accepted_ratio=_accepted(engine, series) if series else None,
        accept_length=_accept_length(engine, series) if series else None,
        won_seconds=_selected(engine, series.won) if series else None,
        kv_cache_ratio=_selected(engine, series.kv_usage) if series else None,
        planned_bytes=_total(agent, "pascaline_plan_total_bytes"),
        actual_bytes=_memory_of(pages, name),
        ttft=ttft,
        itl=itl,
        ttft_seconds=_mean(ttft, before.ttft if before else None),
        itl_seconds=_mean(itl, before.itl if before else None),
    )


def _state(agent: Page | None) -> str:
    if agent is None:
        return "no agent"
    current = [sample.labels["state"] for sample in agent.select("pascaline_instance_state") if sample.value == 1]
    return current[0] if current else "unknown"


def _memory_of(pages: HostPages, name: str) -> float | None:
    """Return the GPU memory of the instance's unit; of all processes if it is the only instance and has no unit."""
    if pages.exporter is None:
        return None
    metric = "nvidia_gpu_process_memory_used_bytes"
    of_unit = pages.exporter.total(metric, unit=f"pascaline-{name}.service")
    alone = len(pages.instances) == 1 and not any(
        sample.labels.get("unit", "").startswith("pascaline-") for sample in pages.exporter.select(metric)
    )
    return pages.exporter.total(metric) if of_unit is None and alone else of_unit


def _series_of(page: Page | None) -> Series | None:
    """Return the series of the engine whose page this is."""
    every = (engine.series for engine in ENGINES.values()) if page else ()
    return next((series for series in every if _selected(page, series.running) is not None), None)


def _selected(page: Page | None, selector: Selector | None) -> float | None:
    return _total(page, selector.name, **selector.labels) if selector else None


def _accepted(page: Page | None, series: Series) -> float | None:
    drafted, accepted = _selected(page, series.drafted), _selected(page, series.accepted)
    return accepted / drafted if drafted and accepted is not None else None


def _accept_length(page: Page | None, series: Series) -> float | None:
    checks, accepted = _selected(page, series.checks), _selected(page, series.accepted)
    return 1 + accepted / checks if checks and accepted is not None else None


def _observed(page: Page | None, histogram: str | None) -> Observed | None:
    if histogram is None:
        return None
    total, count = _total(page, f"{histogram}_sum"), _total(page, f"{histogram}_count")
    return None if total is None or count is None else Observed(total, count)


def _mean(now: Observed | None, before: Observed | None) -> float | None:
    """Return the mean since the previous reading; without one, or after a restart of the engine, of everything."""
    if now is None:
        return None
    if before is None or now.count < before.count:
        before = Observed(0.0, 0.0)
    count = now.count - before.count
    return (now.total_seconds - before.total_seconds) / count if count else None


def _total(page: Page | None, name: str, **labels: str) -> float | None:
    return page.total(name, **labels) if page else None


def _labels(page: Page | None, name: str) -> Mapping[str, str]:
    found = page.select(name) if page else []
    return found[0].labels if found else {}


def _rate(now: float | None, before: float | None, elapsed: float) -> float | None:
    """Return the increase per second; None without two values, or if the engine restarted between them."""
    if now is None or before is None or elapsed <= 0 or now < before:
        return None
    return (now - before) / elapsed
