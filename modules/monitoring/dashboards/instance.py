"""Dashboard Instance: what users of an instance feel, and whether it keeps to its plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import panels as p

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard

_HERE = 'host=~"$host", name=~"$name"'
_WHO = "{{host}} {{name}}"
# GPUs that hold memory of the chosen instances.
_ITS_GPUS = f"and on (host, uuid) instance:gpu_memory_bytes:sum{{{_HERE}}}"


def instance() -> Dashboard:
    """Return the chosen instances."""
    return (
        p.dashboard_of(
            "Pascaline: instance", "pascaline-instance", "One instance: latency, throughput, plan against actual."
        )
        .with_variable(p.variable("host", "Host", 'label_values(up{job="pascaline-agent"}, host)'))
        .with_variable(p.variable("name", "Instance", 'label_values(up{job="pascaline-agent", host=~"$host"}, name)'))
        .with_panel(p.number("Ready", p.NONE, f'sum(pascaline_instance_state{{{_HERE}, state=~"ready|busy"}})'))
        .with_panel(p.number("Tokens/s", p.TOKENS_PER_SECOND, f"sum(instance:generated_tokens:rate5m{{{_HERE}}})"))
        .with_panel(p.number("Queued", p.NONE, f"sum(instance:queued_requests:sum{{{_HERE}}})", red_from=10))
        .with_panel(p.number("Restarts", p.NONE, f"sum(pascaline_engine_restarts_total{{{_HERE}}})", red_from=1))
        .with_panel(p.states("State", f"pascaline_instance_state{{{_HERE}}}", f"{_WHO} {{{{state}}}}"))
        .with_panel(p.heat("Time to first token", p.SECONDS, f"sglang:time_to_first_token_seconds_bucket{{{_HERE}}}"))
        .with_panel(p.heat("Inter-token latency", p.SECONDS, f"sglang:inter_token_latency_seconds_bucket{{{_HERE}}}"))
        .with_panel(
            p.lines(
                "Tokens",
                p.TOKENS_PER_SECOND,
                (f"instance:generated_tokens:rate5m{{{_HERE}}}", f"{_WHO} generated"),
                (f"instance:prompt_tokens:rate5m{{{_HERE}}}", f"{_WHO} prompt"),
            )
        )
        .with_panel(
            p.lines(
                "Requests",
                p.NONE,
                (f"instance:running_requests:sum{{{_HERE}}}", f"{_WHO} running"),
                (f"instance:queued_requests:sum{{{_HERE}}}", f"{_WHO} queued"),
                (f"sglang:num_retracted_reqs{{{_HERE}}}", f"{_WHO} retracted"),
            )
        )
        .with_panel(
            p.lines(
                "KV cache",
                p.RATIO,
                (f"sglang:token_usage{{{_HERE}}}", f"{_WHO} in use"),
                (f"sglang:cache_hit_rate{{{_HERE}}}", f"{_WHO} prefix hits"),
            )
        )
        .with_panel(
            p.lines(
                "Plan against actual",
                p.BYTES,
                (f"sum by (host, name) (instance:gpu_memory_bytes:sum{{{_HERE}}})", f"{_WHO} held"),
                (f"pascaline_plan_total_bytes{{{_HERE}}}", f"{_WHO} planned"),
                (f"instance:plan_limit_bytes:max{{{_HERE}}}", f"{_WHO} alert above"),
            )
        )
        .with_panel(_planned_and_allocated("Weights", "weights_bytes", p.BYTES))
        .with_panel(_planned_and_allocated("KV cache size", "kv_tokens", p.TOKENS))
        .with_panel(
            p.lines("GPU utilisation", p.PERCENT, (f"nvidia_gpu_utilization_gpu {_ITS_GPUS}", "{{host}} GPU {{gpu}}"))
        )
        .with_panel(p.lines("GPU power", p.WATTS, (f"nvidia_gpu_power_draw {_ITS_GPUS}", "{{host}} GPU {{gpu}}")))
        .with_panel(
            p.lines(
                "Latency against its own week",
                p.SECONDS,
                (f"instance:ttft_seconds:p90_10m{{{_HERE}}}", f"{_WHO} first token, p90"),
                (f"instance:ttft_seconds:baseline7d{{{_HERE}}}", f"{_WHO} first token, usual"),
                (f"instance:itl_seconds:p50_10m{{{_HERE}}}", f"{_WHO} between tokens, p50"),
                (f"instance:itl_seconds:baseline7d{{{_HERE}}}", f"{_WHO} between tokens, usual"),
            )
        )
        .with_panel(p.listing("Alerts", f'ALERTS{{alertstate="firing", {_HERE}}}', span=p.HALF))
    )


def _planned_and_allocated(title: str, what: str, unit: str) -> p.PanelBuilder:
    """Return what the plan gives beside what the engine says that it took."""
    return p.lines(
        f"{title}, planned and allocated",
        unit,
        (f"pascaline_plan_{what}{{{_HERE}}}", f"{_WHO} planned"),
        (f"pascaline_engine_{what}{{{_HERE}}}", f"{_WHO} allocated"),
    )
