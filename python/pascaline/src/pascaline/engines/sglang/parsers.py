"""Chooses SGLang's parsers for a model's tool calls and reasoning, by its family and the marks in its chat template."""

# ruff: noqa: RUF001 - tokens of models
from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from pascaline.engines.base import Parsers
from pascaline.plugin import PLUGIN

if TYPE_CHECKING:
    from pascaline.settings import Settings

AUTO, NONE = "auto", "none"


class Rule(NamedTuple):
    """A parser, and the models for which it is chosen."""

    parser: str
    marks: tuple[str, ...]
    """Texts that the template must all contain."""
    families: tuple[str, ...] = ()
    """Prefixes of architecture names to which the rule applies; empty = all."""
    pattern: re.Pattern[str] | None = None
    """What the template must contain besides."""
    in_prompt: re.Pattern[str] | None = None
    """What the generation prompt must contain: the template's end, from its last use of GENERATION_PROMPT on."""

    def fits(self, templates: str, architecture: str) -> bool:
        """Whether this parser reads what the template makes the model write."""
        if self.families and not architecture.startswith(self.families):
            return False
        if not all(mark in templates for mark in self.marks):
            return False
        if self.pattern is not None and not self.pattern.search(templates):
            return False
        return self.in_prompt is None or self.in_prompt.search(templates.rpartition(GENERATION_PROMPT)[2]) is not None


_LEVELS = ("<｜tool▁calls▁begin｜>",)
_GLM_ONE_LINE = re.compile(r"""<tool_call>['"]\s*[+~]\s*tc\.name""")
# Laguna's two templates.
_LAGUNA = re.compile(r"unescaped XML-like object|All available function signatures are listed below")
GENERATION_PROMPT = "add_generation_prompt"
_OPENS_THOUGHTS = re.compile(r"<think>(?!(?:\\n|\s)*</think>)")

TOOL_CALLS = (
    Rule("iquest_q1", ("<iquest_tool_call>",)),
    Rule("gigachat35", ("<｜GCML｜tool_calls>",)),
    Rule("gigachat3", ("function call<|role_sep|>",)),
    Rule("gigachat3", ("<|function_call|>",)),
    Rule("k2_horizon", ("<ifm|tool_call>",)),
    Rule("apertus2509", ("<|tools_prefix|>",)),
    Rule("gemma4", ("<|tool_call>",)),
    Rule("beam", ("<|channel|>", "<rfl:parameter")),
    Rule("gpt-oss", ("<|channel|>", "<|call|>")),
    Rule("inkling", ("<|content_invoke_tool_json|>",)),
    Rule("muse", ("<atem:function_calls>",)),
    Rule("kimi_k3", ("<|open|>", "<|sep|>")),
    Rule("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Rule("minimax-m3", ("]<]minimax[>[",)),
    Rule("minimax-m2", ("<minimax:tool_call>",)),
    Rule("interns1", ("<|action_start|>", "<|plugin|>")),
    Rule("mistral", ("[TOOL_CALLS]",)),
    Rule("deepseekv41", ("<｜DSML｜ calls>",)),
    Rule("deepseekv4", ("<｜DSML｜tool_calls>",)),
    Rule("deepseekv32", ("<｜DSML｜function_calls>",)),
    Rule("deepseekv3", (*_LEVELS, "```json")),
    Rule("deepseekv31", _LEVELS),
    Rule("lfm2", ("<|tool_call_start|>",)),
    Rule("cohere_command4", ("<|START_ACTION|>",)),
    Rule("step3", ("<｜tool_calls_begin｜>",)),
    Rule("step3", ("<steptml:invoke",)),
    Rule("dots", ("<dots_function_call>",)),
    Rule("hunyuan", ("<tool_calls>", "<tool_sep>")),
    Rule("minicpm5", ("<function name=", "<param name=")),
    Rule("poolside_v1", ("<arg_key>",), pattern=_LAGUNA),
    Rule("ling3", ("<role>SYSTEM</role>", "<arg_key>")),
    Rule("spark25", ("<arg_key>",), ("spark",)),
    Rule("glm47", ("<arg_key>",), pattern=_GLM_ONE_LINE),
    Rule("glm45", ("<tool_call>", "<arg_key>")),
    Rule("mimo", ("<tool_call>", "<function="), ("mimo",)),
    Rule("step3p5", ("<tool_call>", "<function="), ("step3", "step35")),
    Rule("qwen3_coder", ("<tool_call>", "<function=")),
    Rule("trinity", ("<tool_call>",), ("afmoe",)),
    # It reads a call with and without line ends round it; Qwen's needs them.
    Rule("qwen25", ("<tool_call>",), ("qwen",)),
    Rule("hermes", ("<tool_call>",)),
    Rule("pythonic", ("<|python_start|>",)),
    Rule("llama3", ("<|python_tag|>",)),
    Rule("llama3", ('{"name": function name, "parameters":',)),
)
"""The first rule that fits wins. Marks: the detectors in SGLang's function_call/."""
TOOL_CALLS_BY_HAND = {
    "glm": "another name of glm45",
    "nanbeige": "another name of qwen3_coder",
    "qwen": "another name of qwen25",
    "response_template": "for folders whose tokenizer_config.json has a response_template",
}
"""Parsers that no rule chooses -> why."""

REASONING = (
    Rule("iquest_q1", ("<|iquest_assistant|>", "<think>")),
    Rule("k2_horizon", ("<ifm|think>",)),
    Rule("apertus2509", ("<|inner_prefix|>",)),
    Rule("gemma4", ("<|channel>",)),
    Rule("kimi", ("◁think▷",)),
    Rule("interns1", ("default_thinking_sys",)),
    Rule("mistral", ("[THINK]",)),
    Rule("beam", ("<|channel|>", "<rfl:parameter")),
    Rule("inkling", ("<|content_thinking|>",)),
    Rule("muse", ("<atem:function_calls>",)),
    Rule("gpt-oss", ("<|channel|>", "<|message|>")),
    Rule("kimi_k3", ("<|open|>", "<|sep|>")),
    Rule("kimi_k2", ("<|tool_calls_section_begin|>", "<think>")),
    Rule("granite_thinking_parser", ("truncate_history_thinking", "defer_loading")),
    Rule("nemotron_3", ("truncate_history_thinking",)),
    Rule("cohere_command4", ("<|START_THINKING|>",)),
    Rule("minimax-m3", ("<mm:think>",)),
    Rule("minimax", ("<minimax:tool_call>", "<think>")),
    Rule("gigachat35", ("<｜GCML｜tool_calls>", "<think>")),
    Rule("ling3", ("<role>SYSTEM</role>", "<think>", "<arg_key>")),
    Rule("hunyuan", ("<tool_calls>", "<tool_sep>", "<think>")),
    Rule("poolside_v1", ("<think>", "<arg_key>"), pattern=_LAGUNA),
    Rule("glm45", ("<think>", "[gMASK]<sop>")),
    Rule("glm45", ("<think>", "<arg_key>")),
    Rule("step3p5", ("<think>",), ("step3", "step35")),
    Rule("step3", ("<think>", "<｜tool_calls_begin｜>")),
    Rule("mimo", ("<think>",), ("mimo",)),
    Rule("dots", ("<think>",), ("dots",)),
    Rule("deepseek-v41", ("<think>", "<｜DSML｜ calls>")),
    Rule("deepseek-v4", ("<think>", "<｜DSML｜tool_calls>")),
    Rule("deepseek-v3", ("<think>",), pattern=re.compile(r"set thinking = false")),
    Rule("qwen3", ("<think>", "enable_thinking")),
    Rule("deepseek-r1", ("<think>", GENERATION_PROMPT), in_prompt=_OPENS_THOUGHTS),
    # DeepSeek's first distilled models open the thoughts themselves; their template only removes old ones.
    Rule("deepseek-r1", ("</think>", "<｜Assistant｜>")),
)
"""The same for reasoning (parser/reasoning_parser.py).

A template that only removes old thoughts (LFM2) has none: SGLang's parsers would take a whole answer for reasoning if
the model does not think.
"""
REASONING_BY_HAND = {
    "minimax-append-think": "leaves the reasoning in the answer, and adds the mark that opens it",
    "nanbeige": "another name of qwen3",
    "qwen3-thinking": "qwen3 for a model that always thinks; deepseek-r1 reads the same",
    "response_template": "for folders whose tokenizer_config.json has a response_template",
}


def choose_parsers(settings: Settings, templates: str, architecture: str) -> Parsers:
    """Return the configured parsers, or those that fit the model.

    templates: the text of the model's chat templates, empty if it has none. architecture: as in ModelSpec.
    """
    chosen = (
        _first_fit(rules, templates, architecture) if given == AUTO else given
        for given, rules in ((settings.tool_call_parser, TOOL_CALLS), (settings.reasoning_parser, REASONING))
    )
    return Parsers(*(None if name == NONE else name for name in chosen))


def parser_arguments(settings: Settings, templates: str, architecture: str = "") -> list[str]:
    """Return SGLang's arguments."""
    chosen = choose_parsers(settings, templates, architecture)
    arguments = []
    for key, name in chosen._asdict().items():
        if name is not None:
            arguments += [f"--{key.replace('_', '-')}", name]
    return arguments


def parser_problems(settings: Settings) -> list[tuple[str, str]]:
    """Return (key, sentence) for every parser that SGLang does not have."""
    known = {"tool_call_parser": PLUGIN.tool_call_parsers, "reasoning_parser": PLUGIN.reasoning_parsers}
    return [
        (key, f"unknown parser {given!r}, must be one of: {', '.join((AUTO, NONE, *names))}")
        for key, names in known.items()
        if (given := getattr(settings, key)) not in (AUTO, NONE, *names)
    ]


def _first_fit(rules: tuple[Rule, ...], templates: str, architecture: str) -> str | None:
    return next((rule.parser for rule in rules if rule.fits(templates, architecture)), None)
