"""Compares the speed estimate with every measured point, whether it is fitted to it or not; prints the error by kind.

    python benchmarks/plan_speed.py

A Markdown table; the points and their sources are in the engine.toml of each engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.planning.hybrid import expected, hybrid_points
from pascaline.planning.speed import Calibration, calibration, kind_of, predicted, speed_points

if TYPE_CHECKING:
    from pascaline.engines.data import HybridPoint, SpeedPoint


def row(point: SpeedPoint, shares: Calibration) -> str:
    """Return one point as a row."""
    kind = kind_of(point.batch)
    compute = float("inf") if kind == "bandwidth" else getattr(shares, kind)
    estimate = predicted(point, shares.bandwidth, compute)
    off = f"{estimate / point.tokens_per_second - 1:+.1%}" + ("" if point.confirmed else " (not fitted)")
    cells = (point.card, point.model, point.phase, point.batch, point.tokens_per_second, f"{estimate:.1f}", off)
    return "| " + " | ".join(map(str, (*cells, point.source))) + " |"


def table(engine: str, *, mixture: bool) -> None:
    """Print the shares of an engine for dense models or mixtures, then the points."""
    points = [point for point in speed_points() if point.engine == engine and point.mixture == mixture]
    if not points:
        return
    shares = calibration(engine, mixture=mixture)
    models = "mixtures of experts" if mixture else "dense models"
    print(f"{engine}, {models} ({shares.basis}): share of the peak, and range of the estimate\n")
    print("| kind | share | range |\n|---|---|---|")
    for kind, error in shares.errors.items():
        print(f"| {kind} | {getattr(shares, kind):.3f} | {error:.1%} |")
    print("\n| card | model | phase | batch | measured, tok/s | estimate | off by | source |")
    print("|---|---|---|---|---|---|---|---|")
    for point in points:
        print(row(point, shares))
    print()


def hybrid_row(point: HybridPoint) -> str:
    """Return one point with experts on the host as a row."""
    estimate = expected(point)
    off = f"{estimate / point.tokens_per_second - 1:+.1%}"
    if point.phase == "decode" and point.host_bytes_per_second is None:
        off += " (host assumed)"
    cells = (point.hardware, point.model, point.expert_layers, point.phase, point.batch, point.tokens_per_second)
    return "| " + " | ".join(map(str, (*cells, f"{estimate:.1f}", off, point.source))) + " |"


def hybrid_table() -> None:
    """Print the points with experts in the host's memory."""
    print("Mixtures with experts in the host's memory\n")
    print("| hardware | model | layers | phase | batch | measured, tok/s | estimate | off by | source |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(hybrid_row, hybrid_points())))


def main() -> None:
    """Print every engine's dense models, then its mixtures, then those with experts in the host's memory."""
    for engine in sorted({point.engine for point in speed_points()}):
        table(engine, mixture=False)
        table(engine, mixture=True)
    hybrid_table()


if __name__ == "__main__":
    main()
