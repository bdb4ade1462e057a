"""A timeline summed up: the kernels that take most, the kinds of work, and how near each comes to the memory's speed.

Decoding reads every weight once a step, and the KV cache of every running request. So the bandwidth that all matrix
products together achieve is (bytes of the weights) x steps / (their time), whatever single kernels tell of themselves.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pascaline.profile.timeline import Kernel, Timeline


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


def summarise(
    timeline: Timeline,
    *,
    bandwidth: float | None = None,
    weights_bytes: int | None = None,
    kv_bytes: int | None = None,
    top: int = 15,
) -> Summary:
    """Sum a timeline up.

    bandwidth: the card's; None = what the record says. weights_bytes, kv_bytes: what one step reads of each.
    """
    roof = bandwidth or timeline.device_bandwidth
    total = sum(kernel.seconds for kernel in timeline.kernels) or 1.0
    by_kind, by_name = defaultdict[str, list["Kernel"]](list), defaultdict[str, list["Kernel"]](list)
    for kernel in timeline.kernels:
        by_kind[kernel.kind].append(kernel)
        by_name[kernel.name].append(kernel)
    exact = {"matmul": weights_bytes, "attention": kv_bytes}
    kinds = [
        _row(kind, kernels, total, roof, moved * timeline.steps if (moved := exact.get(kind)) else None)
        for kind, kernels in by_kind.items()
    ]
    names = [_row(name, kernels, total, roof, None) for name, kernels in by_name.items()]
    wall, step = timeline.wall_seconds, (weights_bytes or 0) + (kv_bytes or 0)
    reached = step * timeline.steps / wall / roof if step and timeline.steps and wall and roof else None
    return Summary(
        device=timeline.device,
        steps=timeline.steps,
        wall_seconds=wall,
        busy_ratio=timeline.busy_seconds / wall if wall else 0.0,
        bandwidth=roof,
        kinds=tuple(sorted(kinds, key=lambda row: -row.seconds)),
        kernels=tuple(sorted(names, key=lambda row: -row.seconds)[:top]),
        step_bytes=step or None,
        step_roof_ratio=reached,
    )


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
