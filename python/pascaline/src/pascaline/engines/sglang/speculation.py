"""Speculation in SGLang with the plugin: prompt lookup, which needs no memory to speak of, or a draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.sglang.acceptance import judge
from pascaline.engines.sglang.vocabulary import tokenizer_difference
from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.errors import ConfigurationError
from pascaline.models.reader import read_model
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

METHODS = ("auto", "none", "lookup", "draft")
"""What the plugin has."""
LEAST_BYTES = 2**30
"""Weights from which auto is lookup on a GPU: a step that reads fewer is as short as the host's work for a check, which
takes some milliseconds (docs/results/speculation.md). On a CPU auto is none: there each row takes its own time."""
DEFAULT_TOKENS = 7
"""Drafted tokens of a request: accepted runs are all or nothing, so a long one wins most where text repeats."""
DRAFT_ROWS = 2
"""Rows of a request in a draft model's first pass (sglang_pascal, speculation/draft_model.py)."""
RESERVED_STEPS = 2
"""Steps for which SGLang reserves slots of each running request (mem_cache/allocation_sizing.py)."""
VARIABLE = PLUGIN.variables["speculative_rows"]
"""The variable that passes the rows to sglang-pascal."""


def speculation(
    settings: Settings, *, device: str, n_bytes: int, columns: int, draft: ModelSpec | None = None
) -> Speculation:
    """Return what is drafted. n_bytes: of the weights. columns: int8 columns of an activation in a decode step.

    draft: the draft model, if the settings name one; it is what auto chooses then.

    One request may have as many rows as all of them together: a step of more would take longer than the weights.
    """
    chosen = settings.speculative
    is_whole = settings.tensor_parallel == 1 and settings.pipeline_parallel == 1
    pays = is_whole and device == "cuda" and n_bytes >= LEAST_BYTES and settings.role == "generate"
    automatic = "draft" if draft is not None else "lookup" if pays else "none"
    method = automatic if chosen.method == "auto" else chosen.method
    rows = PLUGIN.speculative_columns // columns
    tokens = min(chosen.tokens or DEFAULT_TOKENS, rows - 1)
    return NO_SPECULATION if method == "none" else Speculation(method, tokens, rows, draft=draft)


def draft_model(settings: Settings, spec: ModelSpec) -> ModelSpec | None:
    """Return the draft model that the settings name, from its header; None without one.

    Raises ModelError if the file cannot be read, ConfigurationError if it cannot draft for the model.
    """
    path = settings.speculative.draft_model
    if path is None or settings.speculative.method not in ("auto", "draft"):
        return None
    draft = read_model(path)
    if (reason := _unfit(draft, spec)) is not None:
        raise ConfigurationError(f"speculative.draft_model: {path} {reason}")
    return draft


def _unfit(draft: ModelSpec, spec: ModelSpec) -> str | None:
    """Say why a model cannot draft for another."""
    if draft.format != "gguf":
        return "is no GGUF file, and must be one"
    if spec.format != "gguf":
        return "drafts for GGUF files only, but the model is a folder; convert the model, or leave it out"
    if refusals := judge(draft).refusals:
        return f"cannot be loaded: {refusals[0]}"
    if (found := tokenizer_difference(spec, draft)) is not None:
        return f"has another tokenizer than the model: {found}; choose a smaller model of the same family"
    return None


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
    width = ["--speculative-num-draft-tokens", str(found.width)]
    if found.draft is None:
        return ["--speculative-algorithm", PLUGIN.lookup, *width]
    path = found.draft_dir or found.draft.files[0]
    return ["--speculative-algorithm", PLUGIN.draft, *width, "--speculative-draft-model-path", str(path)]


def problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for what the plugin cannot draft."""
    chosen, found = settings.speculative, []
    if chosen.method not in METHODS:
        found.append(
            (
                "speculative.method",
                f"{chosen.method!r} is not available for sglang, whose recorded steps keep no hidden states for heads "
                f"to read; must be one of: {', '.join(METHODS)}; or set engine to llama.cpp, which has eagle3 and mtp",
            )
        )
    else:
        found += _draft_problems(settings)
    if chosen.method in ("lookup", "draft") and settings.tensor_parallel * settings.pipeline_parallel > 1:
        found.append(
            (
                "speculative.method",
                f"{chosen.method!r} works on one device only, must be auto or none "
                "if tensor_parallel or pipeline_parallel is above 1",
            )
        )
    if VARIABLE in settings.environment:
        found.append((f"environment.{VARIABLE}", "is set by the plan, must be left out; set speculative.tokens"))
    return found


def _draft_problems(settings: Settings) -> list[tuple[str, str]]:
    """Return what is wrong with a draft model's presence or absence."""
    chosen, key = settings.speculative, "speculative.draft_model"
    if chosen.draft_model is None:
        sentence = "is missing, must be the GGUF file that speculative.method 'draft' drafts with"
        return [(key, sentence)] if chosen.method == "draft" else []
    given = repr(str(chosen.draft_model))
    if chosen.method not in ("auto", "draft"):
        return [(key, f"{given} is not used by speculative.method {chosen.method!r}, must be left out")]
    if settings.role != "generate":
        return [(key, f"{given} is not used as role is {settings.role!r}, must be left out")]
    if chosen.method == "auto" and settings.tensor_parallel * settings.pipeline_parallel > 1:
        return [
            (
                key,
                f"{given} drafts on one device only, must be left out "
                "if tensor_parallel or pipeline_parallel is above 1",
            )
        ]
    return []
