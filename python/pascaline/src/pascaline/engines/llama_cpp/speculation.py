"""Speculation in llama.cpp: its own methods, by the flags of its builds of 2026 (--spec-type)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.engines.speculation import NO_SPECULATION, Speculation
from pascaline.errors import ConfigurationError
from pascaline.models.reader import read_model

if TYPE_CHECKING:
    from pascaline.models.spec import ModelSpec
    from pascaline.settings import Settings

TYPES = {"lookup": "ngram-simple", "draft": "draft-simple", "eagle3": "draft-eagle3", "mtp": "draft-mtp"}
"""Our names of the methods -> its values of --spec-type."""
WITH_MODEL = ("draft", "eagle3")
"""Methods whose drafts come from a file of their own."""
DEFAULT_TOKENS = {"lookup": 15, "draft": 3, "eagle3": 3, "mtp": 3}
"""Its default with a model (--spec-draft-n-max). A quoted passage is long, and drafting it costs nothing."""
HEADS = ".nextn."
"""In the names of the tensors that predict further tokens (llama.cpp, src/llama-arch.cpp)."""
MATCH = "4"
"""Tokens that must match. Its default of 12 finds nothing in most texts."""
VOCABULARY_SLACK = 128
"""Most tokens by which the vocabularies may differ (common/speculative.cpp, SPEC_VOCAB_MAX_SIZE_DIFFERENCE)."""


def speculation(settings: Settings, spec: ModelSpec) -> Speculation:
    """Return what is drafted; auto is none.

    Raises ModelError if the draft model's file cannot be read, ConfigurationError if it does not fit the model, or if
    the model has no heads.
    """
    chosen = settings.speculative
    if chosen.method in ("auto", "none"):
        return NO_SPECULATION
    if chosen.method == "mtp" and not any(HEADS in tensor.name for tensor in spec.tensors):
        raise ConfigurationError(
            f"speculative.method: 'mtp' needs heads that predict further tokens, and {spec.name or spec.files[0]} "
            f"has no tensor with {HEADS!r} in its name; choose a file with them, or one of: "
            "auto, none, lookup, draft, eagle3"
        )
    draft = None
    if chosen.draft_model is not None:
        draft = read_model(chosen.draft_model)
        if chosen.method == "draft" and abs(draft.vocab_size - spec.vocab_size) > VOCABULARY_SLACK:
            raise ConfigurationError(
                f"speculative.draft_model: {chosen.draft_model} has a vocabulary of {draft.vocab_size:,} tokens, "
                f"must be that of the model ({spec.vocab_size:,}); choose a smaller model of the same family"
            )
    return Speculation(chosen.method, chosen.tokens or DEFAULT_TOKENS[chosen.method], draft=draft)


def arguments(found: Speculation, settings: Settings) -> list[str]:
    """Return its flags."""
    if found.method == "none":
        return []
    flags = ["--spec-type", TYPES[found.method]]
    if found.method == "lookup":
        return [*flags, "--spec-ngram-simple-size-n", MATCH, "--spec-ngram-simple-size-m", str(found.tokens)]
    if settings.speculative.draft_model is not None:
        flags += ["--spec-draft-model", str(settings.speculative.draft_model)]
    return [*flags, "--spec-draft-n-max", str(found.tokens)]


def problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for a draft model that is missing or that nothing uses."""
    chosen = settings.speculative
    if chosen.method in WITH_MODEL and chosen.draft_model is None:
        sentence = f"is missing, must be the GGUF file that speculative.method {chosen.method!r} drafts with"
        return [("speculative.draft_model", sentence)]
    if chosen.method not in WITH_MODEL and chosen.draft_model is not None:
        sentence = f"{str(chosen.draft_model)!r} is not used by speculative.method {chosen.method!r}, must be left out"
        return [("speculative.draft_model", sentence)]
    return []
