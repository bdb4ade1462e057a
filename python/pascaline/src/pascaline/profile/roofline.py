"""Sums up a timeline: the kernels that take most time, the kinds of work, and how near each is to the memory's speed.

Each decode step reads every matrix once, and the KV cache of every running request. The bandwidth that all matrix
products achieve together is therefore (bytes of the matrices) x steps / (their time), whatever single kernels report.

A replayed CUDA graph does not link kernels to operators. But the names of our kernels show what they read, so those of
one weight type moved (bytes of the type) x steps. If several names read one type, as when the number of requests
changed during the record, each gets a share by its number of calls, because every step makes the same number. These
are the bytes that a step must read. Matrices that are read twice (with more than 8 requests) count once, and prefill
does not count, so the figures are too low if a record holds either. Beyond 16 requests cuBLAS multiplies float16
matrices, and its kernels' names do not show what they read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.profile.timeline import KV_CACHE, read_by
from pascaline.text_table import Column, table_lines

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.profile.timeline import Kernel, Timeline


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step must read, bytes; None if unknown."""

    weights: int | None = None
    matrices: Mapping[str, int] | None = None
    """Weights that products read, by the type in which the engine holds them."""
    kv_cache: int | None = None
    """KV cache of the running requests."""

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any], context_tokens: float) -> StepBytes:
        """Take it from the agent's plan. context_tokens: tokens in the KV cache, all requests together.

        An older agent reports only the resident bytes, which include the input embedding.
        """
        return cls(
            plan.get("weights_read_bytes", plan.get("weights_bytes")),
            plan.get("matrix_read_bytes"),
            round((plan.get("kv_bytes_per_token") or 0) * context_tokens) or None,
        )

    @property
    def total(self) -> int:
        """All known bytes together."""
        return (self.weights or 0) + (self.kv_cache or 0)

    @property
    def products(self) -> int | None:
        """Bytes that all products read together."""
        return sum(self.matrices.values()) if self.matrices else self.weights

    @property
    def by_source(self) -> dict[str, int]:
        """The known bytes, by the names that read_by() returns."""
        return {**(self.matrices or {}), **({KV_CACHE: self.kv_cache} if self.kv_cache else {})}


@dataclass(frozen=True, slots=True)
class Row:
    """All kernels of one name, or of one kind."""

    name: str
    count: int
    seconds: float
    share: float
    """Share of the time of all kernels."""
    bytes_per_second: float | None
    """None if the bytes are unknown."""
    roof_ratio: float | None
    """Share of the card's bandwidth; None if the bytes or the bandwidth are unknown."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The sums of a record."""

    device: str
    steps: int
    wall_seconds: float
    busy_ratio: float
    """Share of the time in which a kernel ran; launches and waiting make up the rest."""
    bandwidth: float | None
    """The card's memory bandwidth, bytes per second."""
    kinds: tuple[Row, ...]
    kernels: tuple[Row, ...]
    step_bytes: int | None
    """Least bytes that one step reads: weights, and the KV cache of the running requests."""
    step_roof_ratio: float | None
    """Share of the bandwidth that whole steps reach, launches and waiting included."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "device": self.device,
            "steps": self.steps,
            "wall_seconds": self.wall_seconds,
            "busy_ratio": self.busy_ratio,
            "bandwidth_bytes_per_second": self.bandwidth,
            "step_bytes": self.step_bytes,
            "step_roof_ratio": self.step_roof_ratio,
            "kinds": [_row_json(row) for row in self.kinds],
            "kernels": [_row_json(row) for row in self.kernels],
        }


UNKNOWN = StepBytes()


def summarise(
    timeline: Timeline,
    *,
    bandwidth: float | None = None,
    step: StepBytes = UNKNOWN,
    top: int = 15,
) -> Summary:
    """Sum up a timeline. bandwidth: the card's, bytes per second; None = the record's value."""
    roof = bandwidth or timeline.device_bandwidth
    total = sum(kernel.seconds for kernel in timeline.kernels) or 1.0
    by_kind, by_name = defaultdict[str, list["Kernel"]](list), defaultdict[str, list["Kernel"]](list)
    for kernel in timeline.kernels:
        by_kind[kernel.kind].append(kernel)
        by_name[kernel.name].append(kernel)
    exact = {"matmul": step.products, "attention": step.kv_cache}
    kinds = [
        _row(kind, kernels, total, roof, moved * timeline.steps if (moved := exact.get(kind)) else None)
        for kind, kernels in by_kind.items()
    ]
    calls = {name: len(kernels) for name, kernels in by_name.items()}
    moved_by = _moved(calls, timeline.steps, step)
    names = [_row(name, kernels, total, roof, moved_by.get(name)) for name, kernels in by_name.items()]
    wall, read = timeline.wall_seconds, step.total * timeline.steps
    reached = read / wall / roof if read and wall and roof else None
    return Summary(
        device=timeline.device,
        steps=timeline.steps,
        wall_seconds=wall,
        busy_ratio=timeline.busy_seconds / wall if wall else 0.0,
        bandwidth=roof,
        kinds=tuple(sorted(kinds, key=lambda row: -row.seconds)),
        kernels=tuple(sorted(names, key=lambda row: -row.seconds)[:top]),
        step_bytes=step.total or None,
        step_roof_ratio=reached,
    )


def _moved(calls: Mapping[str, int], steps: int, step: StepBytes) -> dict[str, int]:
    """Return the bytes that our kernels moved, by name; unknown ones are left out. calls: by name."""
    known = step.by_source
    sources = {name: source for name in calls if (source := read_by(name)) in known and source is not None}
    together = Counter[str]()
    for name, source in sources.items():
        together[source] += calls[name]
    return {name: round(known[source] * steps * calls[name] / together[source]) for name, source in sources.items()}


def _row(name: str, kernels: list[Kernel], total: float, roof: float | None, moved: int | None) -> Row:
    seconds = sum(kernel.seconds for kernel in kernels)
    if moved is None and all(kernel.bytes is not None for kernel in kernels):
        moved = sum(kernel.bytes or 0 for kernel in kernels)
    speed = moved / seconds if moved and seconds else None
    return Row(name, len(kernels), seconds, seconds / total, speed, speed / roof if speed and roof else None)


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "count": row.count,
        "seconds": row.seconds,
        "share": row.share,
        "bytes_per_second": row.bytes_per_second,
        "roof_ratio": row.roof_ratio,
    }


def to_text(summary: Summary) -> str:
    """Return the summary as tables for a terminal."""
    head = [f"{summary.device}: {summary.steps or 'unknown'} steps in {summary.wall_seconds * 1e3:.1f} ms"]
    head[0] += f", a kernel ran {summary.busy_ratio:.0%} of the time"
    if summary.steps:
        head[0] += f" ({summary.wall_seconds / summary.steps * 1e3:.2f} ms a step)"
    if summary.bandwidth:
        head.append(f"memory: {summary.bandwidth / 1e9:.0f} GB/s")
    if summary.step_roof_ratio is not None:
        read = (summary.step_bytes or 0) / 1e6
        head.append(f"a step reads at least {read:.1f} MB: {summary.step_roof_ratio:.1%} of the roof, waiting included")
    return "\n".join([*head, "", *_table("kind of work", summary.kinds), "", *_table("kernel", summary.kernels), ""])


NAME_WIDTH = 60
"""Characters of a kernel's name; C++ templates go on for hundreds."""
_COLUMNS = [Column(width=NAME_WIDTH), *(Column(right=True, min_width=width) for width in (7, 9, 6, 7, 5))]


def _table(title: str, rows: tuple[Row, ...]) -> list[str]:
    titles = (title, "calls", "ms", "share", "GB/s", "roof")
    return table_lines([titles, *map(_cells, rows)], _COLUMNS, gap=1)


def _cells(row: Row) -> tuple[str, ...]:
    speed = f"{row.bytes_per_second / 1e9:.1f}" if row.bytes_per_second else "-"
    ratio = f"{row.roof_ratio:.0%}" if row.roof_ratio else "-"
    return row.name, str(row.count), f"{row.seconds * 1e3:.2f}", f"{row.share:.1%}", speed, ratio
