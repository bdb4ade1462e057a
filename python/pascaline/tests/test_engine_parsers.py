"""Which parser of SGLang fits a model: by recorded pieces of templates and its family; every name is SGLang's."""

# ruff: noqa: RUF001 - tokens of models
from __future__ import annotations

import pytest
from pascaline.engines import ENGINES
from pascaline.engines.sglang.parsers import (
    REASONING,
    REASONING_BY_HAND,
    TOOL_CALLS,
    TOOL_CALLS_BY_HAND,
    choose_parsers,
    parser_arguments,
)
from pascaline.plugin import PLUGIN
from pascaline.settings import Settings

HERMES = '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
CODER = "<tool_call>\n<function=example_function_name>\n<parameter=a>"
GLM = "[gMASK]<sop><tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>"
THOUGHTS = "{%- if enable_thinking is defined %}<think>\n\n</think>"
# What a model is called -> its architecture, a piece of its template, and the two parsers.
MODELS = {
    "Qwen 2.5": ("qwen2", HERMES, "qwen25", None),
    "Qwen 3": ("qwen3", HERMES + THOUGHTS, "qwen25", "qwen3"),
    "Qwen 3 Instruct 2507": ("qwen3", HERMES + "{% if add_generation_prompt %}<|im_start|>assistant", "qwen25", None),
    "Qwen 3 Thinking 2507": (
        *("qwen3", HERMES + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"),
        *("qwen25", "deepseek-r1"),
    ),
    "Qwen 3 Coder": ("qwen3moe", CODER, "qwen3_coder", None),
    "Qwen 3.5": ("qwen35", CODER + THOUGHTS, "qwen3_coder", "qwen3"),
    "Hermes 3": ("llama", HERMES, "hermes", None),
    "SmolLM 3": ("smollm3", HERMES + THOUGHTS, "hermes", "qwen3"),
    "Trinity": ("afmoe", HERMES, "trinity", None),
    "MiMo": ("mimo2", CODER + THOUGHTS, "mimo", "mimo"),
    "Step 3.5": ("step35", CODER + "<think>", "step3p5", "step3p5"),
    "Llama 3.1": ("llama", "{{- '<|python_tag|>' + tool_call.name }}", "llama3", None),
    "Llama 3.2": ("llama", 'Respond in the format {"name": function name, "parameters": dictionary', "llama3", None),
    "Llama 4": ("llama4", "{{- '<|python_start|>' }}", "pythonic", None),
    "Mistral": ("llama", "{{- '[TOOL_CALLS] [' }}", "mistral", None),
    "Magistral": ("llama", "{{- '[TOOL_CALLS] [' }}[THINK]", "mistral", "mistral"),
    "LFM 2": ("lfm2", "<|tool_call_start|>[f(a=1)]<|tool_call_end|> {% if '</think>' in content %}", "lfm2", None),
    "DeepSeek R1, distilled": ("qwen2", "{{'<｜Assistant｜>'}}{% if '</think>' in content %}", None, "deepseek-r1"),
    "DeepSeek V3": ("deepseek2", "<｜tool▁calls▁begin｜>\\n```json", "deepseekv3", None),
    "DeepSeek V3.1": (
        *("deepseek2", "{% set thinking = false %}<think><｜tool▁calls▁begin｜>"),
        *("deepseekv31", "deepseek-v3"),
    ),
    "DeepSeek V3.2": ("deepseek32", "<｜DSML｜function_calls>", "deepseekv32", None),
    "DeepSeek V4": ("deepseek4", "<｜DSML｜tool_calls><think>", "deepseekv4", "deepseek-v4"),
    "DeepSeek V4.1": ("deepseek4", "<｜DSML｜ calls><think>", "deepseekv41", "deepseek-v41"),
    "GLM 4.5": ("glm4moe", GLM + THOUGHTS, "glm45", "glm45"),
    "GLM 4.7": ("glm4moe", GLM + "{{- '<tool_call>' + tc.name -}}" + THOUGHTS, "glm47", "glm45"),
    "Kimi K2": ("deepseek2", "<|tool_calls_section_begin|>", "kimi_k2", None),
    "Kimi K2 Thinking": ("deepseek2", "<|tool_calls_section_begin|><think>", "kimi_k2", "kimi_k2"),
    "Kimi K3": ("kimi-k3", "<|open|>tools<|sep|>", "kimi_k3", "kimi_k3"),
    "Kimi VL": ("deepseek2", "◁think▷", None, "kimi"),
    "gpt-oss": ("gpt-oss", "<|channel|>commentary<|message|><|call|>", "gpt-oss", "gpt-oss"),
    "MiniMax M2": ("minimax-m2", "<minimax:tool_call><think>", "minimax-m2", "minimax"),
    "MiniMax M3": ("minimax-m3", "]<]minimax[>[<mm:think>", "minimax-m3", "minimax-m3"),
    "Gemma 4": ("gemma4", "<|tool_call>call<|channel>", "gemma4", "gemma4"),
    "Command A": ("cohere2", "<|START_THINKING|><|START_ACTION|>", "cohere_command4", "cohere_command4"),
    "Hunyuan": ("hunyuan-dense", "<think><tool_calls><tool_sep>", "hunyuan", "hunyuan"),
    "Step 3": ("step3", "<｜tool_calls_begin｜>", "step3", None),
    "Step 3 with thoughts": ("other", "<think><｜tool_calls_begin｜>", "step3", "step3"),
    "dots": ("dots1", "<dots_function_call><think>", "dots", "dots"),
    "InternLM": ("internlm3", "<|action_start|> <|plugin|>default_thinking_sys", "interns1", "interns1"),
    "Nemotron 3": ("nemotron_h", CODER + "truncate_history_thinking<think>", "qwen3_coder", "nemotron_3"),
    "Granite 4.2": ("granite", "truncate_history_thinking defer_loading", None, "granite_thinking_parser"),
    "Apertus": ("apertus", "<|tools_prefix|><|inner_prefix|>", "apertus2509", "apertus2509"),
    "MiniCPM 5": ("minicpm", "<function name='a'><param name='b'>".replace("'", '"'), "minicpm5", None),
    "Laguna": (
        *("laguna", "All available function signatures are listed below<arg_key><think>"),
        *("poolside_v1", "poolside_v1"),
    ),
    "Ling 3": ("bailingmoe3", "<role>SYSTEM</role><arg_key><think>", "ling3", "ling3"),
    "Spark 2.5": ("spark", "<tool_call><arg_key>", "spark25", None),
    "IQuest": ("iquest", "<|iquest_assistant|><iquest_tool_call><think>", "iquest_q1", "iquest_q1"),
    "GigaChat 3": ("deepseek2", "function call<|role_sep|>", "gigachat3", None),
    "GigaChat 3.5": ("deepseek2", "<｜GCML｜tool_calls><think>", "gigachat35", "gigachat35"),
    "K2 Horizon": ("k2", "<ifm|think><ifm|tool_call>", "k2_horizon", "k2_horizon"),
    "Muse": ("muse", "<atem:function_calls>", "muse", "muse"),
    "Inkling": ("inkling", "<|content_thinking|><|content_invoke_tool_json|>", "inkling", "inkling"),
    "Beam": ("beam", "<|channel|><rfl:parameter", "beam", "beam"),
    "SmolLM 2": ("llama", "{{'<|im_start|>' + message['role']}}", None, None),
    "a model without a template": ("llama", "", None, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_family_and_template_choose_the_parsers(name: str) -> None:
    architecture, text, tools, thoughts = MODELS[name]
    assert choose_parsers(Settings(), text, architecture) == (tools, thoughts)
    expected = ["--tool-call-parser", tools] if tools else []
    expected += ["--reasoning-parser", thoughts] if thoughts else []
    assert parser_arguments(Settings(), text, architecture) == expected


def test_every_parser_is_chosen_for_some_model_or_says_why_not() -> None:
    assert {tools for _, _, tools, _ in MODELS.values()} - {None} | TOOL_CALLS_BY_HAND.keys() == set(
        PLUGIN.tool_call_parsers
    )
    assert {each for *_, each in MODELS.values()} - {None} | REASONING_BY_HAND.keys() == set(PLUGIN.reasoning_parsers)
    assert {rule.parser for rule in TOOL_CALLS}.isdisjoint(TOOL_CALLS_BY_HAND)
    assert {rule.parser for rule in REASONING}.isdisjoint(REASONING_BY_HAND)


def test_a_setting_comes_before_the_template() -> None:
    _, text, *_ = MODELS["Qwen 3"]
    chosen = Settings(tool_call_parser="hermes", reasoning_parser="none")
    assert parser_arguments(chosen, text) == ["--tool-call-parser", "hermes"]
    assert parser_arguments(Settings(tool_call_parser="none", reasoning_parser="none"), text) == []


def test_llama_cpp_has_its_own() -> None:
    assert ENGINES["llama.cpp"].parsers(Settings(engine="llama.cpp"), HERMES, "qwen2") is None


def test_the_choice_is_said_in_a_sentence() -> None:
    both = choose_parsers(Settings(), *MODELS["Qwen 3"][1::-1])
    assert both.sentence == "tool calls are read by qwen25, reasoning by qwen3"
    neither = choose_parsers(Settings(), "", "llama")
    assert neither.sentence == "no parser of tool calls, no parser of reasoning"


@pytest.mark.parametrize("key", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_refused_with_the_list(key: str) -> None:
    [(where, sentence)] = ENGINES["sglang"].problems(Settings.model_validate({key: "qwen9"}))
    assert where == key
    names = PLUGIN.tool_call_parsers if key == "tool_call_parser" else PLUGIN.reasoning_parsers
    assert sentence == f"unknown parser 'qwen9', must be one of: auto, none, {', '.join(names)}"
