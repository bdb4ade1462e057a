"""Turns races against llama.cpp into the planner's shares of the peak for this engine, each with its range.

    python benchmarks/race_shares.py [RACE.json ...]

By default it reads every race in docs/results. No Pascal card has run this engine yet, but several have run llama.cpp,
whose shares are fitted to them. So a share of ours is llama.cpp's, times how much faster our kernels were on one card,
both programs as Pascal code, in the width that is the default:
  bandwidth    one request: the speeds
  small_batch  2 to 8 requests: the time of a step beyond that of one request
  large_batch  prompts of up to 2048 tokens, whose attention is small: the speeds
The geometric mean of all rows is the share; the range goes from the lowest row to the highest. What is printed is for
engines/sglang/engine.toml, whose [efficiency] must not be further from it than the range. Exit code 1 if one is.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.engines import engine_named
from pascaline.planning.speed import SMALL_BATCH, calibration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LONGEST_PROMPT = 2048
KINDS = ("bandwidth", "small_batch", "large_batch")


@dataclass(frozen=True)
class Share:
    """One share of the peak, with the lowest and the highest row."""

    value: float
    low: float
    high: float
    rows: int


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return kind -> how much faster ours were than llama.cpp. rows: of one race's JSON."""
    pairs = {(row["what"], row["n"]): (_ours(row), row["llama_cpp"]) for row in rows}
    known = {key: pair for key, pair in pairs.items() if pair[0] and pair[1]}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    one = known.get(("decode", 1))
    for (what, n), (ours, theirs) in known.items():
        if what == "prompt" and n <= LONGEST_PROMPT:
            found["large_batch"].append(ours / theirs)
        elif what == "decode" and n == 1:
            found["bandwidth"].append(ours / theirs)
        elif what == "decode" and n <= SMALL_BATCH and one:
            beyond = [n / speed - 1 / alone for speed, alone in zip((ours, theirs), one, strict=True)]
            if min(beyond) > 0:
                found["small_batch"].append(beyond[1] / beyond[0])
    return found


def _ours(row: dict[str, Any]) -> float | None:
    speed: float | None = row["ours"].get(str(row.get("default_bits")))
    return speed


def shares(races: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Share]:
    """Return kind -> share of the peak; a kind without a row is left out."""
    theirs, found = calibration("llama.cpp"), {}
    gathered = [ratios(rows) for rows in races]
    for kind in KINDS:
        factors = [factor for each in gathered for factor in each[kind]]
        if factors:
            share = getattr(theirs, kind)
            mean = math.exp(sum(map(math.log, factors)) / len(factors))
            found[kind] = Share(share * mean, share * min(factors), share * max(factors), len(factors))
    return found


def table(found: dict[str, Share]) -> tuple[str, bool]:
    """Return the table, and whether what the planner has is within every range."""
    known, theirs = engine_named("sglang").data.efficiency, calibration("llama.cpp")
    lines = ["| kind | llama.cpp's share | ours | range | rows | the planner's |", "|---|---|---|---|---|---|"]
    for kind, share in found.items():
        cells = (kind, f"{getattr(theirs, kind):.3f}", f"{share.value:.3f}", f"{share.low:.3f} to {share.high:.3f}")
        lines.append("| " + " | ".join((*cells, str(share.rows), f"{known[kind].value:g}")) + " |")
    fits = all(share.low <= known[kind].value <= share.high for kind, share in found.items())
    return "\n".join(lines) + "\n", fits


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    paths = [Path(name) for name in arguments] or sorted(RESULTS.glob("race-*.json"))
    if not paths:
        sys.stderr.write(f"race_shares: error: {RESULTS} has no race; run benchmarks/race.py first\n")
        return 2
    text, fits = table(shares(json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths))
    sys.stdout.write(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
