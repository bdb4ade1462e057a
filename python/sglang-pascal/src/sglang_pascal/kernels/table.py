"""The table of the kernels on Pascal: what the compiler made of them, and upper bounds of their speed.

The bounds are of products as they are served, with either width of the activations (`activation_bits`). They are
estimates by arithmetic, no measurements: of a Tesla P4 at its default clock, with full memory bandwidth and every issue
slot used. No Pascal card reaches them; what they show is which of both limits a kernel meets first.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.errors import PluginError, StorageError
from sglang_pascal.kernels.formats import FORMATS
from sglang_pascal.kernels.static import KernelReport, analyse
from sglang_pascal.ops.matmul import DECODE_WIDTHS, KINDS, parts

if TYPE_CHECKING:
    from pathlib import Path

P4_BANDWIDTH: Final = 192e9
"""Bytes per second: 256 bit of GDDR5 at 6 Gbit/s a pin (NVIDIA, Tesla P4 datasheet)."""
P4_LANE_INSTRUCTIONS: Final = 20 * 4 * 32 * 1.063e9
"""Lane instructions per second: 20 multiprocessors x 4 schedulers x 32 lanes x base clock."""
_HEAD: Final = (
    "| kernel | threads | registers | shared bytes | spilled bytes | warps per SM | loop: instructions | issue slots |"
)
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


@dataclass(frozen=True)
class Bound:
    """Estimated upper bound of a model's decode speed on a P4."""

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


def bounds(reports: list[KernelReport]) -> list[Bound]:
    """For each model, width of the activations and batch size, from the issue slots per weight of the products.

    Each kernel of a batch (`ops.matmul.parts`) reads the weights once and is bound by the slower of both.
    """
    slots = {(*r.module.split(".")[:2], r.bits, r.outputs): r.slots_per_weight for r in reports if r.slots_per_weight}
    found = []
    for model, bits, batch in itertools.product(MODELS, sorted(DECODE_WIDTHS, reverse=True), BATCHES):
        kernels = [(KINDS[part.is_tiles], part.width, -(-part.n // part.width)) for part in parts(batch, bits)]
        if all((kind, name, bits, width) in slots for kind, width, _ in kernels for name in model.weights):
            memory = len(kernels) * sum(n * FORMATS[name].weight_bytes for name, n in model.weights.items())
            issue = sum(
                times * n * slots[kind, name, bits, width]
                for kind, width, times in kernels
                for name, n in model.weights.items()
            )
            by_memory, by_issue = batch * P4_BANDWIDTH / memory, batch * P4_LANE_INSTRUCTIONS / issue
            found.append(Bound(model.name, bits, batch, by_memory, by_issue))
    return found


def budget(tensor_type: str) -> float:
    """Return the issue slots per weight at which a P4's instructions take as long as its memory."""
    return P4_LANE_INSTRUCTIONS / (P4_BANDWIDTH / FORMATS[tensor_type].weight_bytes)


def as_markdown(reports: list[KernelReport]) -> str:
    """Return the tables of docs/kernels.md."""
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|", *map(_row, reports)]
    products = [report for report in reports if report.slots_per_weight]
    if products:
        lines += ["", "| product | bits | N | rows a lane | issue slots per weight | of a P4's budget (estimate) |"]
        lines += ["|---|---|---|---|---|---|", *map(_product_row, products)]
        lines += ["", f"| model, Q4_K_M | bits | batch | {' | '.join(_LIMITS)} |"]
        lines += ["|---|---|---|---|---|---|", *map(_bound_row, bounds(reports))]
    return "\n".join(lines) + "\n"


def _row(report: KernelReport) -> str:
    loop = report.main_loop
    cells = (
        *(report.name, report.threads, report.registers, report.shared_bytes, report.spill_bytes),
        *(report.warps_per_sm, loop.instructions if loop else "", loop.slots if loop else ""),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _product_row(report: KernelReport) -> str:
    kind, slots = report.module.split(".")[1], report.slots_per_weight or 0.0
    rows = "tile" if report.module.startswith("tile_matmul") else report.rows_per_lane
    cells = (kind, report.bits, report.outputs, rows, f"{slots:.2f}")
    return f"| {' | '.join(map(str, cells))} | {100 * slots / budget(kind):.0f} % |"


def _bound_row(bound: Bound) -> str:
    return (
        f"| {bound.model} | {bound.bits} | {bound.batch} | {bound.memory_tokens_per_second:.0f} | "
        f"{bound.issue_tokens_per_second:.0f} | {bound.tokens_per_second:.0f} |"
    )


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
        sys.stdout.write(as_markdown(reports))


def update_document(path: Path) -> None:
    """Put the table for sm_61 between the marks in a Markdown file."""
    try:
        before, begin, rest = path.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise PluginError(f"{path} has no place for the table; put the lines {BEGIN} and {END} into it")
        path.write_text(f"{before}{BEGIN}\n{as_markdown(analyse('61'))}{END}{after}")
    except OSError as exc:
        raise StorageError(f"cannot update {path}: {exc.strerror}") from exc
