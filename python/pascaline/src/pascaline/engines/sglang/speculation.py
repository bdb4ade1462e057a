"""Speculation in SGLang with the plugin: prompt lookup, which needs neither weights nor memory to speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.settings import Settings

METHODS = ("auto", "none", "lookup")
"""What the plugin has."""
LEAST_BYTES = 2**30
"""Weights from which auto is lookup on a GPU: a step that reads fewer is as short as the host's work for a check, which
takes some milliseconds (docs/results/speculation.md). On a CPU auto is none: there each row takes its own time."""
DEFAULT_TOKENS = 7
"""Drafted tokens of a request: accepted runs are all or nothing, so a long one wins most where text repeats."""
RESERVED_STEPS = 2
"""Steps for which SGLang reserves slots of each running request (mem_cache/allocation_sizing.py)."""
VARIABLE = PLUGIN.variables["speculative_rows"]
"""The variable that passes the rows to sglang-pascal."""


def speculation(settings: Settings, *, device: str, n_bytes: int, columns: int) -> Speculation:
    """Return what is drafted. n_bytes: of the weights. columns: int8 columns of an activation in a decode step.

    One request may have as many rows as all of them together: a step of more would take longer than the weights.
    """
    chosen = settings.speculative
    is_whole = settings.tensor_parallel == 1 and settings.pipeline_parallel == 1
    pays = is_whole and device == "cuda" and n_bytes >= LEAST_BYTES and settings.role == "generate"
    method = ("lookup" if pays else "none") if chosen.method == "auto" else chosen.method
    rows = PLUGIN.speculative_columns // columns
    tokens = min(chosen.tokens or DEFAULT_TOKENS, rows - 1)
    return Speculation(method, tokens, rows) if method == "lookup" else NO_SPECULATION


def reserved_tokens(found: Speculation) -> int:
    """Return the slots of the KV pool that a running request holds beyond its tokens."""
    return 0 if found.method == "none" else RESERVED_STEPS * found.width


def widths(found: Speculation) -> list[int]:
    """Return the numbers of rows of one request for which steps are recorded, without 1."""
    if found.method == "none":
        return []
    return sorted({*(width for width in PLUGIN.speculative_widths if 1 < width < found.width), found.width})


def arguments(found: Speculation) -> list[str]:
    """Return SGLang's flags."""
    if found.method == "none":
        return []
    return ["--speculative-algorithm", PLUGIN.lookup, "--speculative-num-draft-tokens", str(found.width)]


def problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for what the plugin cannot draft."""
    chosen, found = settings.speculative, []
    if chosen.method not in METHODS:
        found.append(
            (
                "speculative.method",
                f"{chosen.method!r} is not built for sglang, must be one of: {', '.join(METHODS)}; "
                "or set engine to llama.cpp, which has draft, eagle3 and mtp",
            )
        )
    elif chosen.draft_model is not None:
        found.append(
            ("speculative.draft_model", f"{str(chosen.draft_model)!r} is used by llama.cpp only, must be left out")
        )
    if chosen.method == "lookup" and settings.tensor_parallel * settings.pipeline_parallel > 1:
        found.append(
            (
                "speculative.method",
                "'lookup' works on one device only, must be auto or none "
                "if tensor_parallel or pipeline_parallel is above 1",
            )
        )
    if VARIABLE in settings.environment:
        found.append((f"environment.{VARIABLE}", "is set by the plan, must be left out; set speculative.tokens"))
    return found
