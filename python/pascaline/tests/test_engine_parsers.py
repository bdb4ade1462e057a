"""Which parser of SGLang fits a chat template: by recorded pieces of templates, and every name is SGLang's."""

from __future__ import annotations

import pytest
from pascaline.engines.sglang.parsers import REASONING, TOOL_CALLS, parser_arguments
from pascaline.plugin import PLUGIN
from pascaline.settings import Settings

TEMPLATES = {
    "qwen2.5": ("<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>", "qwen25", None),
    "qwen3": (
        "<tool_call>\n{'name': 1}</tool_call> {%- if enable_thinking is defined %}<think>\n\n</think>", "qwen25", "qwen3"
    ),
    "qwen3-coder": ("<tool_call>\n<function=example_function_name>\n<parameter=a>", "qwen3_coder", None),
    "glm-4.5": ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>", "glm45", None),
    "llama-3.1": ("{{- '<|python_tag|>' + tool_call.name }}", "llama3", None),
    "mistral": ("{{- '[TOOL_CALLS] [' }}", "mistral", None),
    "lfm2": ("<|tool_call_start|>[f(a=1)]<|tool_call_end|>", "lfm2", None),
    "deepseek-r1-distill": ("{{'<think>\\n'}}", None, "deepseek-r1"),
    "smollm2": ("{{'<|im_start|>' + message['role']}}", None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_chooses_the_parsers(name: str) -> None:
    text, tools, thoughts = TEMPLATES[name]
    expected = ["--tool-call-parser", tools] if tools else []
    expected += ["--reasoning-parser", thoughts] if thoughts else []
    assert parser_arguments(Settings(), text) == expected


def test_a_model_without_a_template_has_no_parser() -> None:
    assert parser_arguments(Settings(), "") == []


def test_a_setting_comes_before_the_template() -> None:
    text = TEMPLATES["qwen3"][0]
    chosen = Settings(tool_call_parser="hermes", reasoning_parser="none")
    assert parser_arguments(chosen, text) == ["--tool-call-parser", "hermes"]
    assert parser_arguments(Settings(tool_call_parser="none", reasoning_parser="none"), text) == []


def test_every_name_is_one_of_sglangs() -> None:
    assert {name for _, name in TOOL_CALLS} <= set(PLUGIN.tool_call_parsers)
    assert {name for _, name in REASONING} <= set(PLUGIN.reasoning_parsers)
