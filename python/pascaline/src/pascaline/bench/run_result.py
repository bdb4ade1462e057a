"""One run: the answers to its requests and the readings of the machine during it; to and from JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pascaline.bench.load import Record

_TIME_DIGITS = 6
"""Digits kept of a time in seconds: microseconds, finer than a network's jitter."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of the machine; None if the machine cannot report the value."""

    at: float
    """Seconds after the start of the run."""
    gpu_memory_bytes: float | None = None
    """Memory in use on the engine's GPU, by all processes."""
    gpu_utilization_ratio: float | None = None
    power_watts: float | None = None
    host_memory_bytes: float | None = None
    """Resident main memory of the engine's processes; shared memory counts once."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything recorded in one run."""

    seed: str
    started: float
    """Unix time."""
    seconds: float
    cpu_seconds: float
    """CPU time of the load generator."""
    records: list[Record]
    samples: list[Sample]
    speculation: dict[str, float] = field(default_factory=dict)
    """What the engine drafted: `bench.speculation.FIELDS`; empty if it does not say."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes; times in seconds, to the microsecond."""
        return {
            "seed": self.seed,
            "started": self.started,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "requests": [_rounded(asdict(record)) for record in self.records],
            "samples": [_rounded(asdict(sample)) for sample in self.samples],
            "speculation": _rounded(self.speculation),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Run:
        """Read a run back."""
        return cls(
            seed=document["seed"],
            started=document["started"],
            seconds=document["seconds"],
            cpu_seconds=document["cpu_seconds"],
            records=[Record(**record) for record in document["requests"]],
            samples=[Sample(**sample) for sample in document["samples"]],
            speculation=document.get("speculation", {}),
        )


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    rounded = {}
    for key, value in fields.items():
        if isinstance(value, float):
            value = round(value, _TIME_DIGITS)
        elif isinstance(value, list):
            value = [round(number, _TIME_DIGITS) for number in value]
        rounded[key] = value
    return rounded
