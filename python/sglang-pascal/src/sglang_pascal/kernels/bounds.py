"""What the compiler made of each kernel on Pascal, and upper bounds of their speed, as a table.

The bounds are of products as they are served, with either width of the activations (`activation_bits`). They are
estimates by arithmetic, not measurements, for cards at their base clocks with full memory bandwidth and every issue
slot used. No Pascal card reaches them; they show which of the two limits a kernel meets first.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.errors import PluginError, StorageError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.kernels.static import KernelReport, Loop, analyse
from sglang_pascal.ops.matmul import DECODE_WIDTHS, KINDS, parts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Card:
    """What bounds a product's speed on a card."""

    name: str
    architecture: str
    """Digits of sm_60 or sm_61, whose code the card runs."""
    bandwidth: float
    """Bytes per second."""
    lanes: int
    """Lane instructions per clock of all multiprocessors: 128 each, 64 of a P100."""
    clock: float
    """Base clock in hertz."""
    published: str
    """Published speeds of llama.cpp on the card; sources in docs/results/plan_speed.md."""

    @property
    def lane_instructions(self) -> float:
        """Lane instructions per second."""
        return self.lanes * self.clock


CARDS: Final = (
    Card("Tesla P4", "61", 192e9, 20 * 128, 1.063e9, "9B Q4_K_M, 1 request: 19.7"),
    Card(
        "Tesla P40",
        "61",
        346e9,
        30 * 128,
        1.303e9,
        "8B Q4_K_S, prompt of 512: 937; 7B Q4_K_S, 1 and 4 requests: 53.7, 87.6",
    ),
    Card("Tesla P100 16 GB", "60", 732e9, 56 * 64, 1.126e9, "nothing"),
    Card("GTX 1080 Ti", "61", 484e9, 28 * 128, 1.480e9, "nothing; GTX 1080, 9B Q5_K_M, 1 request: 26.3"),
)
"""NVIDIA's datasheets, as in the cards of `pascaline`."""
P4: Final = CARDS[0]
_HEAD: Final = (
    "| kernel | threads | registers | shared bytes | spilled bytes | warps per SM "
    "| loop: instructions | KB of code | issue slots |"
)
_PRODUCT_HEAD: Final = (
    "| product | bits | N | rows a lane | issue slots per weight | of a P4's budget (estimate) "
    "| issue slots per dp4a | of dp4a's peak at most |"
)
_INSTRUCTION_BYTES: Final = 32 / 3
"""Of Pascal's code: three instructions and what controls them are 32 bytes."""
_LIMITS: Final = ("tok/s by memory", "tok/s by issue slots", "upper bound (estimate)")
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"


@dataclass(frozen=True)
class Model:
    """The weights of a Q4_K_M file that one token reads, by type."""

    name: str
    weights: dict[str, float]
    """Type -> number of weights, with the output head but without the embedding."""


MODELS: Final = (
    Model("Qwen3-4B", {"Q4_K": 3.14e9, "Q6_K": 0.88e9}),
    Model("Qwen2.5-7B", {"Q4_K": 5.71e9, "Q6_K": 1.36e9}),
    Model("Llama-3.1-8B", {"Q4_K": 6.01e9, "Q6_K": 1.50e9}),
)
"""Sums over the layers of the published models' shapes; the head, and the value and down projections of half of the
layers, are Q6_K."""


BATCHES: Final = (1, 2, 4, 8, 12, 16, 24, 32)
PROMPT: Final = 512
CARD_MODEL: Final = "Llama-3.1-8B"
"""Of the table of cards."""
CARD_BATCHES: Final = (1, 4, 8, 16, 32, PROMPT)


@dataclass(frozen=True)
class Bound:
    """Estimated upper bound of a model's speed on a card."""

    model: str
    bits: int
    """Of the activations."""
    batch: int
    """Requests that are decoded together."""
    memory_tokens_per_second: float
    """All requests together, if only memory limited the speed: weights only, empty context."""
    issue_tokens_per_second: float
    """The same, if only issue slots limited the speed."""

    @property
    def tokens_per_second(self) -> float:
        """The lower of the two."""
        return min(self.memory_tokens_per_second, self.issue_tokens_per_second)


def bounds(reports: list[KernelReport], card: Card = P4, batches: Sequence[int] = BATCHES) -> list[Bound]:
    """For each model, width of the activations and batch size, from the issue slots per weight of the products.

    Each kernel of a batch (`ops.matmul.parts`) reads the weights once and is bound by the slower of both.
    """
    slots = {(*r.module.split(".")[:2], r.bits, r.outputs): r.slots_per_weight for r in reports if r.slots_per_weight}
    found = []
    for model, bits, batch in itertools.product(MODELS, sorted(DECODE_WIDTHS, reverse=True), batches):
        kernels = [(KINDS[part.is_tiles], part.width, -(-part.n // part.width)) for part in parts(batch, bits)]
        if all((kind, name, bits, width) in slots for kind, width, _ in kernels for name in model.weights):
            memory = len(kernels) * sum(n * FORMATS[name].weight_bytes for name, n in model.weights.items())
            issue = sum(
                times * n * slots[kind, name, bits, width]
                for kind, width, times in kernels
                for name, n in model.weights.items()
            )
            by_memory, by_issue = batch * card.bandwidth / memory, batch * card.lane_instructions / issue
            found.append(Bound(model.name, bits, batch, by_memory, by_issue))
    return found


def budget(tensor_type: str) -> float:
    """Return the issue slots per weight at which a P4's instructions take as long as its memory."""
    return P4.lane_instructions / (P4.bandwidth / FORMATS[tensor_type].weight_bytes)


def as_markdown(reports: list[KernelReport], reports_60: list[KernelReport] | None = None) -> str:
    """Return the tables of docs/kernels.md; with the products of sm_60 also what cards reach."""
    lines = [_HEAD, "|---" * 9 + "|", *map(_row, reports)]
    products = [report for report in reports if report.slots_per_weight]
    if products:
        lines += ["", _PRODUCT_HEAD, "|---" * 8 + "|", *map(_product_row, products)]
        lines += ["", f"| model, Q4_K_M | bits | batch | {' | '.join(_LIMITS)} |"]
        lines += ["|---|---|---|---|---|---|", *map(_bound_row, bounds(reports))]
        if reports_60:
            lines += ["", *_card_table({"61": reports, "60": reports_60})]
    return "\n".join(lines) + "\n"


def _row(report: KernelReport) -> str:
    loop = report.main_loop
    cells = (
        *(report.name, report.threads, report.registers, report.shared_bytes, report.spill_bytes),
        *(
            report.warps_per_sm,
            *((loop.instructions, f"{code_bytes(loop) / 1024:.1f}", loop.slots) if loop else [""] * 3),
        ),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def code_bytes(loop: Loop) -> float:
    """Return how much of the instruction cache a loop takes."""
    return loop.instructions * _INSTRUCTION_BYTES


def slots_per_dp4a(report: KernelReport) -> float:
    """Return the issue slots of a product's loop for each of its dp4a, or of its dp2a in their place."""
    return (report.slots_per_weight or 0.0) * 4 / report.columns


def _product_row(report: KernelReport) -> str:
    kind, slots = report.module.split(".")[1], report.slots_per_weight or 0.0
    each = slots_per_dp4a(report)
    rows = "tile" if report.module.startswith("tile_matmul") else report.rows_per_lane
    cells = (kind, report.bits, report.outputs, rows, f"{slots:.2f}")
    shares = (f"{100 * slots / budget(kind):.0f} %", f"{each:.2f}", f"{100 / each:.0f} %")
    return f"| {' | '.join(map(str, (*cells, *shares)))} |"


def _bound_row(bound: Bound) -> str:
    return (
        f"| {bound.model} | {bound.bits} | {bound.batch} | {bound.memory_tokens_per_second:.0f} | "
        f"{bound.issue_tokens_per_second:.0f} | {bound.tokens_per_second:.0f} |"
    )


def _card_table(reports: dict[str, list[KernelReport]]) -> list[str]:
    """The upper bounds of one model on all cards."""
    names = [f"prompt of {batch}" if batch == PROMPT else f"{batch}" for batch in CARD_BATCHES]
    lines = [f"| {CARD_MODEL}, tok/s at most (estimate) | bits | {' | '.join(names)} | published of llama.cpp |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for card in CARDS:
        found = [b for b in bounds(reports[card.architecture], card, CARD_BATCHES) if b.model == CARD_MODEL]
        for bits in (16, 8):
            speeds = {bound.batch: f"{bound.tokens_per_second:.0f}" for bound in found if bound.bits == bits}
            cells = [
                card.name,
                str(bits),
                *(speeds.get(batch, "") for batch in CARD_BATCHES),
                card.published if bits == 8 else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def print_table(architecture: str, *, as_json: bool) -> None:
    """Print the tables to standard output."""
    reports = analyse(architecture)
    if as_json:
        facts: dict[str, Any] = {
            "architecture": f"sm_{architecture}",
            "kernels": [
                asdict(r) | {"warps_per_sm": r.warps_per_sm, "slots_per_weight": r.slots_per_weight} for r in reports
            ],
            "estimates": [asdict(bound) for bound in bounds(reports)] if architecture == "61" else [],
        }
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write(as_markdown(reports, products_60() if architecture == "61" else None))


PRODUCTS_60: Final = tuple(f"{kind}.{name}." for kind in KINDS.values() for name in ("Q4_K", "Q6_K"))
"""Modules whose code for a P100 the table of cards needs: the products of the types in MODELS."""


def products_60() -> list[KernelReport]:
    """Analyse them."""
    return analyse("60", PRODUCTS_60)


def update_document(path: Path) -> None:
    """Put the table for sm_61 between the marks in a Markdown file."""
    try:
        before, begin, rest = path.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise PluginError(f"{path} has no place for the table; put the lines {BEGIN} and {END} into it")
        path.write_text(f"{before}{BEGIN}\n{as_markdown(analyse('61'), products_60())}{END}{after}")
    except OSError as exc:
        raise StorageError(f"cannot update {path}: {exc.strerror}") from exc
