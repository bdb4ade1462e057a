"""The agent's Prometheus metrics. Names, types and labels are a contract (docs/metrics.md)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from pascaline import __version__
from pascaline.gpu.processes import identify
from pascaline.redaction import redact_labels
from pascaline.serving.failure import FailureKind
from pascaline.serving.health import State

if TYPE_CHECKING:
    from pascaline.engines import Task
    from pascaline.planning import Plan

DROPPED_CAUSES = ("flood", "repeated", "unread")
# A generation of one token: milliseconds on an idle GPU, many seconds behind a long prefill.
PROBE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

ALLOCATED = {
    "weights_bytes": "Memory of the weights, as the engine reports it",
    "kv_bytes": "Memory of the KV cache, as the engine reports it",
    "kv_tokens": "Tokens that the engine's KV cache holds",
}
"""Values that an engine may report about its memory -> help text of the metric."""


class Metrics:
    """All series of one instance, in a registry of their own."""

    def __init__(self) -> None:
        """Register the series that exist from the start."""
        # Otherwise each counter gets a second series, _created, that nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client gives it no types
        self.registry = CollectorRegistry()
        self._late: dict[str, Gauge] = {}
        self._state = self._gauge("pascaline_instance_state", "1 for the state that the instance is in", ["state"])
        self.engine_up = self._gauge("pascaline_engine_up", "Whether the engine's process runs")
        self.engine_memory = self._gauge(
            "pascaline_engine_resident_memory_bytes",
            "Memory of the host that the engine's processes hold alone (RssAnon), sampled every five seconds",
        )
        self.restarts = Counter(
            "pascaline_engine_restarts", "Restarts of the engine", ["reason"], registry=self.registry
        )
        for reason in FailureKind:
            self.restarts.labels(reason)
        self.stage_seconds = self._gauge(
            "pascaline_time_to_ready_seconds", "Duration of each stage of the last start", ["stage"]
        )
        self.probe_seconds = Histogram(
            "pascaline_probe_seconds",
            "Duration of a test generation of one token that succeeded",
            buckets=PROBE_BUCKETS,
            registry=self.registry,
        )
        self.probe_failures = Counter(
            "pascaline_probe_failures", "Test generations that failed or got no answer", registry=self.registry
        )
        self.starts = self._gauge(
            "pascaline_starts_since_stable",
            "Starts of the instance since it last served for ten minutes or was stopped in order",
        )
        self.internal_errors = Counter(
            "pascaline_internal_errors",
            "Unexpected exceptions in the supervisor; the log holds the traceback of each",
            registry=self.registry,
        )
        self._dropped = Counter(
            "pascaline_log_lines_dropped",
            "Lines that are missing in the log: too many per second, repeated, or not read in time",
            ["cause"],
            registry=self.registry,
        )
        for cause in DROPPED_CAUSES:
            self._dropped.labels(cause)
        self.last_generation = self._gauge(
            "pascaline_last_successful_generation_timestamp_seconds",
            "Unix time at which progress on tokens was last observed; 0 before the first",
        )
        self._settings = self._gauge(
            "pascaline_settings_info",
            "1; the settings of the instance",
            ["model", "served_model_name", "engine", "port", "device", "dtype", "card", "unit", "role"],
        )
        self._gauge("pascaline_build_info", "1; the version of pascaline", ["version"]).labels(__version__).set(1)
        self.set_state(State.PLANNED)

    def set_state(self, state: State) -> None:
        """Set the current state to 1 and all others to 0."""
        for each in State:
            self._state.labels(each.value).set(each is state)

    def count_dropped(self, cause: str, lines: int) -> None:
        """Count lines that are missing in the log; safe to call from any thread."""
        self._dropped.labels(cause).inc(lines)

    def set_task(self, task: Task, card: str | None) -> None:
        """Publish what the engine is started with; these series do not exist before."""
        model = (str(task.settings.model), task.model.served_name)
        engine = (task.settings.engine, task.settings.port, task.device, task.dtype)
        # The unit links the instance to its processes on a GPU: the exporter reports their unit too.
        self._settings.clear()
        self._settings.labels(*model, *engine, card or "", identify(os.getpid()).unit, task.settings.role).set(1)
        limits = {
            "context_length": task.context_length,
            "max_running_requests": task.settings.max_running_requests,
            "max_total_tokens": task.max_total_tokens,
        }
        for name, value in limits.items():
            self._set(f"pascaline_settings_{name}", f"Effective value of the setting {name}", value)

    def set_plan(self, plan: Plan) -> None:
        """Publish what the plan allows; these series do not exist before."""
        values = {
            "total_bytes": ("Memory of the device that the plan gives the instance", plan.total_bytes),
            "weights_bytes": ("Planned memory of the model's weights", plan.weights_bytes),
            "kv_bytes": ("Planned memory of the KV cache", plan.kv_bytes),
            "kv_tokens": ("Tokens that the plan gives the KV cache", plan.kv_tokens),
            "device_bytes": ("Memory of the device according to the plan", plan.card_bytes),
        }
        for name, (text, value) in values.items():
            self._set(f"pascaline_plan_{name}", text, value)

    def set_allocated(self, allocated: dict[str, int]) -> None:
        """Publish the memory that the engine reports as allocated, beside the plan's series."""
        for name, value in allocated.items():
            self._set(f"pascaline_engine_{name}", ALLOCATED[name], value)

    def page(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        return redact_labels(generate_latest(self.registry).decode()).encode()

    def _set(self, name: str, text: str, value: float) -> None:
        """Set a series, and register it if this is its first value."""
        if name not in self._late:
            self._late[name] = self._gauge(name, text)
        self._late[name].set(value)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(name, text, labels or (), registry=self.registry)
