"""Dashboard Host: the GPUs of a host and all that slows or breaks them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import panels as p

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard

_HERE = 'host=~"$host"'
_GPU = "{{host}} GPU {{gpu}}"


def host() -> Dashboard:
    """Return the GPUs of the chosen hosts."""
    return (
        p.dashboard_of(
            "Pascaline: host", "pascaline-host", "GPUs of a host: load, memory, heat, power, link and errors."
        )
        .with_variable(p.variable("host", "Host", 'label_values(up{job="pascaline-exporter"}, host)'))
        .with_panel(p.listing("GPUs", f"nvidia_gpu_info{{{_HERE}}}"))
        .with_panel(p.lines("Utilisation", p.PERCENT, (f"nvidia_gpu_utilization_gpu{{{_HERE}}}", _GPU)))
        .with_panel(
            p.lines("Memory bus", p.RATIO, (f"nvidia_gpu_memory_bus_utilization_ratio{{{_HERE}}}", _GPU)),
        )
        .with_panel(
            p.lines(
                "Memory against its budget",
                p.BYTES,
                (f"nvidia_gpu_memory_used_bytes{{{_HERE}}}", f"{_GPU} used"),
                (f"gpu:memory_budget_bytes:min{{{_HERE}}}", f"{_GPU} budget"),
                (f"nvidia_gpu_memory_total_bytes{{{_HERE}}}", f"{_GPU} card"),
            )
        )
        .with_panel(
            p.lines(
                "Memory by process",
                p.BYTES,
                (f"nvidia_gpu_process_memory_used_bytes{{{_HERE}}}", f"{_GPU} {{{{process}}}} {{{{unit}}}}"),
                stacked=True,
            )
        )
        .with_panel(
            p.lines(
                "Temperature",
                p.CELSIUS,
                (f"nvidia_gpu_temperature_gpu{{{_HERE}}}", _GPU),
                (f'nvidia_gpu_temperature_threshold_celsius{{{_HERE}, threshold="slowdown"}}', f"{_GPU} slowdown"),
            )
        )
        .with_panel(
            p.lines(
                "Power",
                p.WATTS,
                (f"nvidia_gpu_power_draw{{{_HERE}}}", _GPU),
                (f'nvidia_gpu_power_limit_watts{{{_HERE}, limit="enforced"}}', f"{_GPU} limit"),
            )
        )
        .with_panel(
            p.lines(
                "Clocks", p.HERTZ, (f'nvidia_gpu_clock_hertz{{{_HERE}, clock=~"sm|memory"}}', f"{_GPU} {{{{clock}}}}")
            )
        )
        .with_panel(
            p.states(
                "Throttling",
                f'nvidia_gpu_throttle_reason{{{_HERE}, reason!="gpu_idle"}}',
                f"{_GPU} {{{{reason}}}}",
                span=p.HALF,
            )
        )
        .with_panel(
            p.lines(
                "PCIe traffic",
                p.BYTES_PER_SECOND,
                (f"nvidia_gpu_pcie_throughput_bytes_per_second{{{_HERE}}}", f"{_GPU} {{{{direction}}}}"),
            )
        )
        .with_panel(
            p.lines(
                "PCIe replays a minute",
                p.NONE,
                (f"rate(nvidia_gpu_pcie_replays_total{{{_HERE}}}[$__rate_interval]) * 60", _GPU),
            )
        )
        .with_panel(
            p.lines(
                "Uncorrected memory errors and retired pages",
                p.NONE,
                (
                    f'nvidia_gpu_ecc_errors_total{{{_HERE}, error="uncorrected", location="total"}}',
                    f"{_GPU} {{{{counter}}}}",
                ),
                (f"nvidia_gpu_retired_pages{{{_HERE}}}", f"{_GPU} {{{{cause}}}}"),
            )
        )
        .with_panel(
            p.lines("Xid errors", p.NONE, (f"nvidia_gpu_xid_errors_total{{{_HERE}}}", f"{_GPU} Xid {{{{xid}}}}"))
        )
        .with_panel(p.listing("Alerts", f'ALERTS{{alertstate="firing", {_HERE}}}'))
    )
