"""The speed estimate beside every measured point that it is fitted to, or that was left out, with the error by kind.

    python benchmarks/plan_speed.py

A Markdown table; the points and their sources are in pascaline/cards/planning.toml.
"""

from __future__ import annotations

from pascaline.cards import SpeedPoint, speed_points
from pascaline.planning.speed import Calibration, calibration, kind_of, predicted


def row(point: SpeedPoint, shares: Calibration) -> str:
    """One point as a line."""
    kind = kind_of(point.batch)
    compute = float("inf") if kind == "bandwidth" else getattr(shares, kind)
    estimate = predicted(point, shares.bandwidth, compute)
    off = f"{estimate / point.tokens_per_second - 1:+.1%}" + ("" if point.confirmed else " (not fitted)")
    cells = (point.card, point.model, point.phase, point.batch, point.tokens_per_second, f"{estimate:.1f}", off)
    return "| " + " | ".join(map(str, (*cells, point.source))) + " |"


def main() -> None:
    """Print the shares, then the points."""
    for engine in sorted({point.engine for point in speed_points()}):
        shares = calibration(engine)
        print(f"{engine}: share of the peak, and root mean square of the relative error\n")
        print("| kind | share | error |\n|---|---|---|")
        for kind, error in shares.errors.items():
            print(f"| {kind} | {getattr(shares, kind):.3f} | {error:.1%} |")
        print("\n| card | model | phase | batch | measured, tok/s | estimate | off by | source |")
        print("|---|---|---|---|---|---|---|---|")
        for point in speed_points():
            if point.engine == engine:
                print(row(point, shares))


if __name__ == "__main__":
    main()
