"""The card's memory as a picture: one bar with a legend.

`drawing` is the design, as boxes, lines and words at pixels from the top left; `svg` writes it, and `png` renders the
SVG by resvg.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple

from pascaline.errors import MissingError

if TYPE_CHECKING:
    from pascaline.planning.plan import Plan

COLOURS = {
    "weights": "#4c78a8",
    "kv_pool": "#f58518",
    "tables": "#b279a2",
    "rounding": "#9d755d",
    "workspace": "#ff9da6",
    "page_tables": "#d6a5c9",
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
WIDTH, BAR_HEIGHT, ROW_HEIGHT, MARGIN = 760, 44, 22, 24
"""Pixels."""
LEGEND_COLUMNS, COLUMN_GAP = 2, 40
INK, QUIET, PAPER = "#1c2321", "#5b6661", "#ffffff"
_FONTS = "DejaVu Sans, Verdana, sans-serif"


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


class Box(NamedTuple):
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str


class Line(NamedTuple):
    """A vertical line."""

    x: float
    top: float
    bottom: float
    colour: str


class Words(NamedTuple):
    """A text on a baseline."""

    x: float
    y: float
    text: str
    colour: str = INK
    bold: bool = False
    anchor: Literal["start", "middle", "end"] = "start"


Shape = Box | Line | Words


class Drawing(NamedTuple):
    """The whole picture."""

    height: int
    """Pixels; the width is WIDTH."""
    shapes: tuple[Shape, ...]


def title(plan: Plan) -> str:
    """Return the picture's title."""
    verdict = "fits" if plan.fits else "does not fit"
    return f"{plan.model} on {plan.card}: {verdict}"


def subtitle(plan: Plan) -> str:
    """Return what was planned."""
    request = plan.request
    kv = f"KV cache in {request.kv_dtype}"
    return f"context {plan.context_length:,}, {request.max_running_requests} requests, {kv}, {request.engine}"


def drawing(plan: Plan) -> Drawing:
    """Return the picture of a plan."""
    stretches = pieces(plan)
    whole = max(plan.card_bytes, sum(piece.n_bytes for piece in stretches)) or 1
    top = MARGIN + 4 * ROW_HEIGHT
    rows = -(-len(stretches) // LEGEND_COLUMNS)
    shapes: list[Shape] = [
        Words(MARGIN, MARGIN + 12, title(plan), bold=True),
        Words(MARGIN, MARGIN + 12 + ROW_HEIGHT, subtitle(plan), QUIET),
        *_bar(stretches, whole, top),
        *_limit(plan, whole, top),
    ]
    for number, piece in enumerate(stretches):
        column, row = divmod(number, rows)
        shapes += _legend(piece, column, top + BAR_HEIGHT + ROW_HEIGHT * (row + 1))
    return Drawing(top + BAR_HEIGHT + ROW_HEIGHT * (rows + 1) + MARGIN, tuple(shapes))


def _bar(stretches: list[Piece], whole: int, top: float) -> list[Shape]:
    inner, x, shapes = WIDTH - 2 * MARGIN, float(MARGIN), list[Shape]()
    for piece in stretches:
        width = inner * piece.n_bytes / whole
        shapes.append(Box(x, top, width, BAR_HEIGHT, piece.colour))
        x += width
    return shapes


def _limit(plan: Plan, whole: int, top: float) -> list[Shape]:
    """Return the card's limit and its label, which stays inside the picture."""
    edge = MARGIN + (WIDTH - 2 * MARGIN) * plan.card_bytes / whole
    colour = INK if plan.headroom_bytes >= 0 else COLOURS["missing"]
    missing = "" if plan.headroom_bytes >= 0 else f", {-plan.headroom_bytes / 2**20:,.0f} MiB too few"
    label = f"the card has {plan.card_bytes / 2**20:,.0f} MiB{missing}"
    anchor: Literal["start", "end"] = "end" if edge > WIDTH / 2 else "start"
    return [Line(edge, top - 6, top + BAR_HEIGHT + 6, colour), Words(edge, top - 12, label, colour, anchor=anchor)]


def _legend(piece: Piece, column: int, y: float) -> list[Shape]:
    width = (WIDTH - 2 * MARGIN - COLUMN_GAP) / LEGEND_COLUMNS
    left = MARGIN + column * (width + COLUMN_GAP)
    size = f"{piece.n_bytes / 2**20:,.1f} MiB"
    return [
        Box(left, y, 12, 12, piece.colour),
        Words(left + 20, y + 11, piece.name),
        Words(left + width, y + 11, size, anchor="end"),
    ]


def svg(plan: Plan) -> str:
    """Return a complete SVG document."""
    height, shapes = drawing(plan)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{_FONTS}" font-size="13" role="img">',
        f'<title>{escape(title(plan))}</title><rect width="100%" height="100%" fill="{PAPER}"/>',
        *map(_element, shapes),
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _element(shape: Shape) -> str:
    match shape:
        case Box(x, y, width, height, colour):
            return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height}" fill="{colour}"/>'
        case Line(x, top, bottom, colour):
            return f'<line x1="{x:.2f}" y1="{top}" x2="{x:.2f}" y2="{bottom}" stroke="{colour}" stroke-width="2"/>'
        case Words(x, y, text, colour, bold, anchor):
            weight = ' font-weight="bold"' if bold else ""
            place = f'x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" fill="{colour}"{weight}'
            return f"<text {place}>{escape(text)}</text>"


def png(plan: Plan) -> bytes:
    """Return the SVG as PNG, two pixels for each of its own. Raises MissingError without resvg-py or any font."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise MissingError("--picture: PNG needs resvg-py; run: pip install resvg-py, or write .svg") from error
    return rendered(svg(plan))


def rendered(document: str, *, fonts: bool = True) -> bytes:
    """Return an SVG as PNG. fonts: whether to use those of the host. Raises MissingError if the host has none."""
    import resvg_py

    # resvg leaves out texts for which it has no font, and does not report it.
    probe = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    empty, word = (
        resvg_py.svg_to_bytes(svg_string=probe.format(content), skip_system_fonts=not fonts)
        for content in ("", f'<text y="15" font-family="{_FONTS}">M</text>')
    )
    if empty == word:
        raise MissingError("--picture: PNG needs a font, and this host has none; install DejaVu Sans, or write .svg")
    return resvg_py.svg_to_bytes(svg_string=document, zoom=2, skip_system_fonts=not fonts)
