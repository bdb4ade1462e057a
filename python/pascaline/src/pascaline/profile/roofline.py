"""A timeline summed up: the kernels that take most, the kinds of work, and how near each comes to the memory's speed.

Decoding reads every matrix once a step, and the KV cache of every running request. So the bandwidth that all matrix
products together achieve is (bytes of the matrices) x steps / (their time), whatever single kernels tell of themselves.

A replayed CUDA graph ties no kernel to an operator. But the names of our kernels tell what they read, so that those of
one weight type moved (bytes of the type) x steps. Where several names read one type, as when the number of requests
changed in between, each has its share by the number of its calls: every step makes as many. These are the bytes that a
step must read. What is read twice counts once (the matrices, for more than 8 requests), and prefill counts nothing: the
figures are too low where a record holds either. Beyond 16 requests cuBLAS multiplies float16 matrices, under names that
tell nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.profile.timeline import KV_CACHE, read_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.profile.timeline import Kernel, Timeline


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step must read; None where that is not known."""

    weights: int | None = None
    matrices: Mapping[str, int] | None = None
    """Of the weights those that products read, by the type in which the engine holds them."""
    kv_cache: int | None = None
    """Of the running requests."""

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any], context_tokens: float) -> StepBytes:
        """Take it from a plan as the agent serves it. context_tokens: in the KV cache, all requests together.

        An older agent tells only what is resident, the input embedding included.
        """
        return cls(
            plan.get("weights_read_bytes", plan.get("weights_bytes")),
            plan.get("matrix_read_bytes"),
            round((plan.get("kv_bytes_per_token") or 0) * context_tokens) or None,
        )

    @property
    def total(self) -> int:
        """As far as it is known."""
        return (self.weights or 0) + (self.kv_cache or 0)

    @property
    def products(self) -> int | None:
        """What all products together read."""
        return sum(self.matrices.values()) if self.matrices else self.weights

    @property
    def by_source(self) -> dict[str, int]:
        """What is known, by what read_by() calls it."""
        return {**(self.matrices or {}), **({KV_CACHE: self.kv_cache} if self.kv_cache else {})}


@dataclass(frozen=True, slots=True)
class Row:
    """Kernels of one name, or of one kind."""

    name: str
    count: int
    seconds: float
    share: float
    """Of the time of all kernels."""
    bytes_per_second: float | None
    """None where the bytes are not known."""
    roof_ratio: float | None
    """Of the card's bandwidth; None where one of the two is not known."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a record says."""

    device: str
    steps: int
    wall_seconds: float
    busy_ratio: float
    """Share of the time in which a kernel ran; what is missing is launches and waiting."""
    bandwidth: float | None
    """The roof, bytes per second."""
    kinds: tuple[Row, ...]
    kernels: tuple[Row, ...]
    step_bytes: int | None
    """That one step must read at least: weights, and the KV cache of the running requests."""
    step_roof_ratio: float | None
    """Of the roof that whole steps reach, launches and waiting included."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
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
    """Sum a timeline up. bandwidth: the card's, bytes per second; None = what the record says."""
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
    """Bytes that kernels of ours moved, by name, as far as they are known. calls: by name."""
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


def _table(title: str, rows: tuple[Row, ...]) -> list[str]:
    lines = [f"{title:<{NAME_WIDTH}} {'calls':>7} {'ms':>9} {'share':>6} {'GB/s':>7} {'roof':>5}"]
    for row in rows:
        speed = f"{row.bytes_per_second / 1e9:.1f}" if row.bytes_per_second else "-"
        ratio = f"{row.roof_ratio:.0%}" if row.roof_ratio else "-"
        name = row.name if len(row.name) <= NAME_WIDTH else row.name[: NAME_WIDTH - 1] + "…"
        lines.append(
            f"{name:<{NAME_WIDTH}} {row.count:>7} {row.seconds * 1e3:>9.2f} {row.share:>6.1%} {speed:>7} {ratio:>5}"
        )
    return lines
