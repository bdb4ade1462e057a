"""Dashboard Fleet: is every host there, what does the fleet serve, what does it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import panels as p

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard


def fleet() -> Dashboard:
    """Return all hosts side by side."""
    return (
        p.dashboard_of("Pascaline: fleet", "pascaline-fleet", "All hosts: who serves, how fast, at what heat and cost.")
        .with_panel(
            p.number("Hosts that answer", p.NONE, 'count(max by (host) (up{job=~"pascaline-.+"}) == 1) or vector(0)')
        )
        .with_panel(p.number("GPUs", p.NONE, "count(nvidia_gpu_lost == 0) or vector(0)"))
        .with_panel(p.number("Instances ready", p.NONE, 'sum(pascaline_instance_state{state=~"ready|busy"})'))
        .with_panel(p.number("Alerts firing", p.NONE, 'count(ALERTS{alertstate="firing"}) or vector(0)', red_from=1))
        .with_panel(p.lines("Generated tokens", p.TOKENS_PER_SECOND, ("host:generated_tokens:rate5m", "{{host}}")))
        .with_panel(
            p.lines(
                "Requests",
                p.COUNT,
                ("sum by (host) (instance:running_requests:sum)", "{{host}} running"),
                ("sum by (host) (instance:queued_requests:sum)", "{{host}} queued"),
            )
        )
        .with_panel(
            p.lines(
                "GPU memory in use",
                p.RATIO,
                (
                    "sum by (host) (nvidia_gpu_memory_used_bytes) / sum by (host) (nvidia_gpu_memory_total_bytes)",
                    "{{host}}",
                ),
            )
        )
        .with_panel(p.lines("Hottest GPU", p.CELSIUS, ("max by (host) (nvidia_gpu_temperature_gpu)", "{{host}}")))
        .with_panel(p.lines("Power", p.WATTS, ("host:power_draw_watts:avg5m", "{{host}}"), span=p.THIRD))
        .with_panel(
            p.lines("Tokens per joule", p.TOKENS_PER_JOULE, ("host:tokens_per_joule:rate5m", "{{host}}"), span=p.THIRD)
        )
        .with_panel(
            p.lines(
                "Cost of a million tokens",
                p.NONE,
                ("host:cost_per_million_tokens:rate5m", "{{host}} {{currency}}"),
                span=p.THIRD,
            )
        )
        .with_panel(p.listing("Instances and their state", "pascaline_instance_state == 1", span=p.HALF))
        .with_panel(p.listing("Alerts", 'ALERTS{alertstate="firing"}', span=p.HALF))
    )
