"""Turns races against llama.cpp into the planner's shares of the peak for this engine, each with its range.

    python benchmarks/race_shares.py [RACE.json ...]

By default it reads every race in docs/results. No Pascal card has run this engine yet, so a race on another card, both
programs as Pascal code, says two things:
  by llama.cpp  its share, fitted to measurements on Pascal cards, times how much faster ours was in the race
  direct        ours of the rate at which the race's card does dp4a
Kinds of work, in 8 bits, since the planner counts 16 bits as two columns of 8:
  bandwidth    one request, in the width that is the default; only by llama.cpp: memory does not limit the race's card
  small_batch  2 to 8 requests: the time of a step beyond that of one request
  large_batch  prompts of up to 2048 tokens, whose attention is small
Shown are the geometric mean of the rows, and the lowest and the highest of all of both.

What the planner has ([efficiency] in engines/sglang/engine.toml) is what the kernels' issue slots on sm_61 allow
(docs/kernels.md), since the race's card multiplies and loads at other rates. The race must not contradict it: exit code
1 if it lies outside of the range of both by more than the planner's own error.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from pascaline.planning.speed import SMALL_BATCH, calibration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import models

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LONGEST_PROMPT = 2048
COLUMN_BITS = 8
ONE = ("decode", 1)
KINDS = ("bandwidth", "small_batch", "large_batch")


DP4A_MACS_PER_SECOND = {"NVIDIA H200": 132 * 64 * 4 * 1.98e9}
"""Multiprocessors x dp4a a clock, half of Pascal's (probe_dp4a of benchmarks/first_hour_on_pascal.py) x 4 x clock."""


@dataclass(frozen=True)
class Share:
    """One share of the peak, as a race has it."""

    by_llama_cpp: float
    direct: float | None
    """None where it says nothing."""
    low: float
    high: float
    """Of all rows, both ways."""
    rows: int


def shares(races: Iterable[dict[str, Any]]) -> dict[str, Share]:
    """Return kind -> share of the peak; a kind without a row is left out. races: their JSON."""
    theirs, found = calibration("llama.cpp"), {}
    gathered = [(ratios(race["rows"]), directly(race)) for race in races]
    for kind in KINDS:
        scaled = [getattr(theirs, kind) * factor for each, _ in gathered for factor in each[kind]]
        direct = [share for _, each in gathered for share in each.get(kind, [])]
        if scaled:
            every = [*scaled, *direct]
            mean = geometric_mean(direct) if direct else None
            found[kind] = Share(geometric_mean(scaled), mean, min(every), max(every), len(scaled))
    return found


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return kind -> how much faster ours were than llama.cpp. rows: of one race's JSON."""
    by_default, of_8_bits = (_pairs(rows, bits) for bits in (None, COLUMN_BITS))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    found["bandwidth"] += [ours / theirs for key, (ours, theirs) in by_default.items() if key == ONE]
    for (what, n), (ours, theirs) in of_8_bits.items():
        if what == "prompt" and n <= LONGEST_PROMPT:
            found["large_batch"].append(ours / theirs)
        elif what == "decode" and 1 < n <= SMALL_BATCH and ONE in of_8_bits:
            beyond = [n / speed - 1 / alone for speed, alone in zip((ours, theirs), of_8_bits[ONE], strict=True)]
            if min(beyond) > 0:
                found["small_batch"].append(beyond[1] / beyond[0])
    return found


def directly(race: dict[str, Any]) -> dict[str, list[float]]:
    """Return kind -> our shares of the card's dp4a rate; nothing for an unknown card or model."""
    peak, shape = DP4A_MACS_PER_SECOND.get(race["card"]), models.SHAPES.get(Path(race["model"]).stem)
    if peak is None or shape is None:
        return {}
    sizes = {name: math.prod(size) for name, size in models.tensor_shapes(shape).items() if len(size) > 1}
    macs = sum(sizes.values()) - sizes["token_embd.weight"]
    found: dict[str, list[float]] = {"small_batch": [], "large_batch": []}
    speeds = {key: ours for key, (ours, _) in _pairs(race["rows"], COLUMN_BITS).items()}
    for (what, n), speed in speeds.items():
        if what == "prompt" and n <= LONGEST_PROMPT:
            found["large_batch"].append((macs - sizes["output.weight"]) * speed / peak)
        elif what == "decode" and 1 < n <= SMALL_BATCH and (beyond := n / speed - 1 / speeds.get(ONE, math.inf)) > 0:
            share = n * macs / beyond / peak
            # Above the peak: that step took no longer than its weights, so it says nothing about arithmetic.
            found["small_batch"] += [share] if share <= 1 else []
    return found


def _pairs(rows: Sequence[dict[str, Any]], bits: int | None) -> dict[tuple[str, int], tuple[float, float]]:
    """Return (what, n) -> our speed and llama.cpp's where both are known. bits: None = the default's."""
    pairs = {
        (row["what"], row["n"]): (row["ours"].get(str(bits or row.get("default_bits"))), row["llama_cpp"])
        for row in rows
    }
    return {key: pair for key, pair in pairs.items() if pair[0] and pair[1]}


def table(found: dict[str, Share]) -> tuple[str, bool]:
    """Return the table, and whether no race contradicts the planner."""
    known, theirs = calibration("sglang"), calibration("llama.cpp")
    head = ("kind", "llama.cpp's on Pascal", "ours by llama.cpp", "ours directly", "range", "rows", "the planner's")
    lines, fits = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"], True
    for kind, share in found.items():
        value, error = getattr(known, kind), known.errors[kind]
        direct = "" if share.direct is None else f"{share.direct:.2f}"
        shown = (f"{getattr(theirs, kind):.2f}", f"{share.by_llama_cpp:.2f}", direct)
        limits = (f"{share.low:.2f} to {share.high:.2f}", str(share.rows))
        planned = f"{value:g} ({value * (1 - error):.2f} to {value * (1 + error):.2f})"
        lines.append("| " + " | ".join((kind, *shown, *limits, planned)) + " |")
        fits = fits and value * (1 - error) <= share.high and share.low <= value * (1 + error)
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
    text, fits = table(shares(json.loads(path.read_text(encoding="utf-8")) for path in paths))
    sys.stdout.write(text)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
