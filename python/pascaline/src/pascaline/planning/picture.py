"""The card's memory as a picture: one bar with a legend, as SVG; the same pieces for other formats."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pascaline.planning.plan import Plan

COLOURS = {
    "weights": "#4c78a8",
    "kv_pool": "#f58518",
    "tables": "#b279a2",
    "rounding": "#9d755d",
    "workspace": "#ff9da6",
    "activations": "#54a24b",
    "logits": "#88d27a",
    "graphs": "#439894",
    "context": "#72b7b2",
    "library": "#a0cbe8",
    "process": "#72b7b2",
    "fragmentation": "#bab0ac",
    "used": "#79706e",
    "free": "#f2f2f2",
    "missing": "#e45756",
}
"""Colour of each part, distinct for colour-blind people too; the legend has the bar's order."""
WIDTH, BAR_HEIGHT, ROW_HEIGHT, MARGIN = 760, 48, 20, 20
"""Pixels."""


class Piece(NamedTuple):
    """One stretch of the bar."""

    name: str
    n_bytes: int
    colour: str


def pieces(plan: Plan) -> list[Piece]:
    """Return the stretches from left to right; a plan that does not fit ends with the missing memory."""
    found = [Piece(part.name, part.n_bytes, COLOURS.get(part.key, "#999999")) for part in plan.parts if part.n_bytes]
    if plan.request.used_bytes:
        found.append(Piece("used by others", plan.request.used_bytes, COLOURS["used"]))
    if plan.headroom_bytes >= 0:
        found.append(Piece("free", plan.headroom_bytes, COLOURS["free"]))
    return found


def title(plan: Plan) -> str:
    """Return the picture's title."""
    verdict = "fits" if plan.fits else "does not fit"
    request = plan.request
    return (
        f"{plan.model} on {plan.card}: context {plan.context_length:,}, {request.max_running_requests} requests, "
        f"KV {request.kv_dtype}: {verdict}"
    )


def svg(plan: Plan) -> str:
    """Return a complete SVG document."""
    stretches = pieces(plan)
    whole = max(plan.card_bytes, sum(piece.n_bytes for piece in stretches)) or 1
    inner = WIDTH - 2 * MARGIN
    top = MARGIN + ROW_HEIGHT
    height = top + BAR_HEIGHT + ROW_HEIGHT * (len(stretches) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<title>{escape(title(plan))}</title><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 5}" font-weight="bold">{escape(title(plan))}</text>',
    ]
    x = float(MARGIN)
    for piece in stretches:
        width = inner * piece.n_bytes / whole
        lines.append(f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{BAR_HEIGHT}" fill="{piece.colour}"/>')
        x += width
    edge = MARGIN + inner * plan.card_bytes / whole
    lines += [
        f'<line x1="{edge:.2f}" y1="{top - 4}" x2="{edge:.2f}" y2="{top + BAR_HEIGHT + 4}" '
        f'stroke="{COLOURS["missing"] if plan.headroom_bytes < 0 else "black"}" stroke-width="2"/>'
    ]
    for row, piece in enumerate(stretches, 1):
        y = top + BAR_HEIGHT + ROW_HEIGHT * row
        text = f"{escape(piece.name)}: {piece.n_bytes / 2**20:,.1f} MiB"
        lines.append(f'<rect x="{MARGIN}" y="{y}" width="12" height="12" fill="{piece.colour}" stroke="#999999"/>')
        lines.append(f'<text x="{MARGIN + 20}" y="{y + 11}">{text}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
