"""Chooses SGLang's parsers for a model's tool calls and reasoning by the marks in its chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.settings import Settings

TOOL_CALLS = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>",), "qwen25"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
)
"""Marks that a template must all contain -> parser of SGLang (function_call/*_detector.py); the first match
wins."""
REASONING = ((("<think>", "enable_thinking"), "qwen3"), (("<think>",), "deepseek-r1"))
"""The same for reasoning (parser/reasoning_parser.py). With `enable_thinking` an answer may have none."""


def parser_arguments(settings: Settings, templates: str) -> list[str]:
    """Return SGLang's arguments; templates: the text of the model's chat templates, empty if it has none."""
    tools, thoughts = settings.tool_call_parser, settings.reasoning_parser
    if tools == "auto":
        tools = _first_fit(TOOL_CALLS, templates) or "none"
    if thoughts == "auto":
        thoughts = _first_fit(REASONING, templates) or "none"
    arguments = [] if tools == "none" else ["--tool-call-parser", tools]
    return arguments + ([] if thoughts == "none" else ["--reasoning-parser", thoughts])


def _first_fit(table: tuple[tuple[tuple[str, ...], str], ...], text: str) -> str | None:
    return next((name for marks, name in table if all(mark in text for mark in marks)), None)
