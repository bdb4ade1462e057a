"""A page that loads nothing: no script, font or picture from outside."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem;
  background: light-dark(#f4f6f5, #101514); color: light-dark(#17211e, #e4eae7); font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.25rem 0 .5rem; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.scroll { overflow-x: auto; } .scroll, .charts svg { border: 1px solid #8884; border-radius: 8px; }
.scroll { background: light-dark(#fff, #181f1d); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; }
"""


def page(title: str, parts: Iterable[str], style: str) -> str:
    """Return a page that follows the reader's light or dark setting.

    title: plain text. parts: HTML; empty ones are left out. style: CSS after that which all pages share, of tables in
    `.scroll` and SVG in `.charts`.
    """
    head = (
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{style}</style></head><body>',
    )
    return "\n".join(part for part in (*head, *parts, "</body></html>") if part) + "\n"
