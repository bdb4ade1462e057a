"""Recorded answers with tool calls and reasoning, read by SGLang's parsers through the plugin, cut at every position."""

# ruff: noqa: RUF001 - tokens of models
from __future__ import annotations

import functools
import importlib.util
import json
from typing import Any

import pytest
from sglang_pascal import tool_streams

pytestmark = [
    pytest.mark.imports_sglang,
    pytest.mark.slow("imports SGLang's server"),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed (./dev sync)"),
]

TOOLS = {
    "get_weather": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "get_time": {"zone": {"type": "string"}},
}
"""Name -> properties of its parameters."""
CALLS = [("get_weather", {"city": "Rome", "days": 3})]
TWO_CALLS = [*CALLS, ("get_time", {"zone": "CET"})]
JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}'
JSON_CALL_2 = '{"name": "get_time", "arguments": {"zone": "CET"}}'
XML = "<parameter={}>\n{}\n</parameter>\n"
CODER = (
    f"<tool_call>\n<function=get_weather>\n{XML.format('city', 'Rome')}{XML.format('days', 3)}</function>\n</tool_call>"
)
ARGS = "<arg_key>city</arg_key>{0}<arg_value>Rome</arg_value>{0}<arg_key>days</arg_key>{0}<arg_value>3</arg_value>{0}"
INVOKE = '<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'


def marked(mark: str, space: str, kind: str) -> str:
    """A call in the form that DeepSeek's and GigaChat's models share."""
    name = f"{mark}{space}"
    string = ' string="{}"'
    return (
        f'<{mark}{kind}>\n<{name}invoke name="get_weather">\n'
        f'<{name}parameter name="city"{string.format("true")}>Rome</{name}parameter>\n'
        f'<{name}parameter name="days"{string.format("false")}>3</{name}parameter>\n'
        f"</{name}invoke>\n</{mark}{kind}>"
    )


DEEPSEEK = "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
DSML, GCML = "｜DSML｜", "｜GCML｜"
MINIMAX = "]<]minimax[>["
RECORDED = {
    "hermes": f"Let me look.\n<tool_call>\n{JSON_CALL}\n</tool_call>",
    "qwen25": f"Let me look.\n<tool_call>\n{JSON_CALL}\n</tool_call>\n<tool_call>\n{JSON_CALL_2}\n</tool_call>",
    "trinity": f"Let me look.\n<tool_call>\n{JSON_CALL}\n</tool_call>",
    "qwen3_coder": f"Let me look.\n{CODER}",
    "step3p5": f"Let me look.\n{CODER}",
    "mimo": "Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n"
    "<parameter=days>3</parameter>\n</function>\n</tool_call>",
    "glm45": f"Let me look.\n<tool_call>get_weather\n{ARGS.format(chr(10))}</tool_call>",
    "glm47": f"Let me look.\n<tool_call>get_weather{ARGS.format('')}</tool_call>",
    "ling3": f"Let me look.\n<tool_call>get_weather\n{ARGS.format(chr(10))}</tool_call>",
    "poolside_v1": f"Let me look.\n<tool_call>get_weather\n{ARGS.format(chr(10))}</tool_call>",
    "spark25": f"Let me look.\n<tool_call>get_weather\n{ARGS.format('')}\n</tool_call>",
    "iquest_q1": f"Let me look.\n<iquest_tool_call>get_weather{ARGS.format('')}</iquest_tool_call>",
    "hunyuan": f"Let me look.<tool_calls><tool_call>get_weather<tool_sep>{ARGS.format('')}</tool_call></tool_calls>",
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome", "days": 3}[TOOL_CALLS]get_time[ARGS]{"zone": "CET"}',
    "llama3": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome", "days": 3}}',
    "pythonic": '[get_weather(city="Rome", days=3)]',
    "lfm2": '<|tool_call_start|>[get_weather(city="Rome", days=3)]<|tool_call_end|>',
    "kimi_k2": "Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city": "Rome", "days": 3}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
    'type="string"<|sep|>Rome<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument'
    "<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
    "deepseekv3": DEEPSEEK.format('function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome", "days": 3}\n```'),
    "deepseekv31": DEEPSEEK.format('get_weather<｜tool▁sep｜>{"city": "Rome", "days": 3}'),
    "deepseekv32": f"Let me look.\n\n{marked(DSML, '', 'function_calls')}",
    "deepseekv4": f"Let me look.\n\n{marked(DSML, '', 'tool_calls')}",
    "deepseekv41": f"Let me look.\n\n{marked(DSML, ' ', ' calls')}",
    "gigachat35": f"Let me look.{marked(GCML, '', 'tool_calls')}",
    "minimax-m2": f"Let me look.\n<minimax:tool_call>\n{INVOKE}</minimax:tool_call>",
    "minimax-m3": MINIMAX
    + MINIMAX.join(
        (
            "<tool_call>",
            '<invoke name="get_weather">',
            "<city>Rome",
            "</city>",
            "<days>3",
            "</days>",
            "</invoke>",
            "</tool_call>",
        )
    ),
    "dots": f"Let me look.\n<dots_function_call>\n{INVOKE}</dots_function_call>",
    "minicpm5": 'Let me look.<function name="get_weather"><param name="city">Rome</param><param name="days">3</param></function>',
    "step3": "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
    + INVOKE.replace("<", "<steptml:").replace("<steptml:/", "</steptml:").replace("\n", "")
    + "<｜tool_call_end｜><｜tool_calls_end｜>",
    "cohere_command4": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
    '{"city": "Rome", "days": 3}}]<|END_ACTION|>',
    "interns1": 'Let me look.<|action_start|> <|plugin|>\n{"name": "get_weather", "parameters": '
    '{"city": "Rome", "days": 3}}<|action_end|>',
    "gemma4": 'Let me look.<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>',
    "apertus2509": 'Let me look.<|tools_prefix|>[{"get_weather": {"city": "Rome", "days": 3}}]<|tools_suffix|>',
    "k2_horizon": f"Let me look.<ifm|tool_calls><ifm|tool_call>{JSON_CALL}</ifm|tool_call></ifm|tool_calls>",
    "muse": "to=get_weather<|message|><atem:function_calls>\n"
    + INVOKE.replace("<", "<atem:").replace("<atem:/", "</atem:")
    + "</atem:function_calls><|eom|>",
    "inkling": '<|content_invoke_tool_json|>{"name": "get_weather", "args": {"city": "Rome", "days": 3}}<|end_message|>',
}
"""Parser -> an answer in the model's own form."""
NOT_RECORDED = {
    "beam": "its calls are whole messages in a form of its own, and no model of the family runs on Pascal",
    "gigachat3": "SGLang leaves its mark in the text of every stream, and no model of the family runs on Pascal",
    "glm": "another name of glm45",
    "nanbeige": "another name of qwen3_coder",
    "qwen": "another name of qwen25",
    "response_template": "reads what a folder's response_template describes",
    "gpt-oss": "its marks are single tokens, which a piece never divides, and no mark of the parser is complete without one",
}
WITH_TEXT = "Let me look."
PLAIN = "2 < 3, [a] and <b> are no calls: {1}.\nThe end <"


# SGLang is imported by the tests, so that the fast tests, which leave all of these out, are collected without it.


@functools.cache
def call_parser() -> Any:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return FunctionCallParser


@functools.cache
def reasoning_parser() -> Any:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    return ReasoningParser


@functools.cache
def tools() -> list[Any]:
    from sglang.srt.entrypoints.openai.protocol import Tool

    parameters = {name: {"type": "object", "properties": properties} for name, properties in TOOLS.items()}
    functions = [{"name": name, "parameters": schema} for name, schema in parameters.items()]
    return [Tool.model_validate({"type": "function", "function": function}) for function in functions]


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrap the parser as the plugin's hooks do."""
    for name, wrap in (("parse_stream_chunk", tool_streams.parse_piece), ("parse_stream_end", tool_streams.parse_end)):
        original = getattr(call_parser(), name)
        if hasattr(original, "__wrapped__"):
            continue

        @functools.wraps(original)
        def wrapped(self, *arguments, original=original, wrap=wrap):
            return wrap(original, self, *arguments)

        monkeypatch.setattr(call_parser(), name, wrapped)


def streamed(name, pieces):
    """Read pieces as SGLang's server does; return the text and the calls."""
    parser = call_parser()(tools(), name)
    found = [parser.parse_stream_chunk(piece) for piece in pieces]
    found.append(parser.parse_stream_end())
    calls: dict[int, list[str]] = {}
    for call in (call for _, some in found for call in some):
        entry = calls.setdefault(call.tool_index, ["", ""])
        entry[0] = entry[0] or call.name
        entry[1] += call.parameters or ""
    text = "".join(text or "" for text, _ in found)
    return text.strip(), [(name, json.loads(arguments)) for _, (name, arguments) in sorted(calls.items())]


def expected(name):
    text = RECORDED[name]
    return WITH_TEXT if text.startswith(WITH_TEXT) else "", TWO_CALLS if "get_time" in text else CALLS


def test_every_parser_is_recorded_or_says_why_not():
    assert RECORDED.keys() | NOT_RECORDED.keys() == set(call_parser().ToolCallParserEnum)


@pytest.mark.parametrize("name", RECORDED)
def test_a_whole_answer(name):
    _, calls = call_parser()(tools(), name).parse_non_stream(RECORDED[name])
    assert [(call.name, json.loads(call.parameters)) for call in calls] == expected(name)[1]


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", RECORDED)
def test_a_stream_cut_at_every_position(name):
    text = RECORDED[name]
    bad = [cut for cut in range(len(text) + 1) if streamed(name, [text[:cut], text[cut:]]) != expected(name)]
    assert bad == []


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("name", RECORDED)
def test_a_stream_in_pieces_of_one_size(name, size):
    text = RECORDED[name]
    assert streamed(name, [text[at : at + size] for at in range(0, len(text), size)]) == expected(name)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", RECORDED)
def test_an_answer_without_a_call_is_not_changed(name):
    # This parser takes white space at the end for a part of a call that did not come.
    expected = PLAIN.removesuffix(" <") if name == "pythonic" else PLAIN
    assert streamed(name, list(PLAIN)) == (expected, [])
    assert streamed(name, [PLAIN]) == (expected, [])


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("size", [1, 3, 200])
def test_mistrals_array_is_read(size):
    """Of several calls in one array, SGLang reads only the first in a stream: docs/api.md says so."""
    text = f"Let me look.[TOOL_CALLS] [{JSON_CALL}]"
    assert streamed("mistral", [text[at : at + size] for at in range(0, len(text), size)]) == (WITH_TEXT, CALLS)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("size", [1, 3, 200])
def test_llamas_call_without_a_mark_is_read(size):
    text = ' {"name": "get_weather", "parameters": {"city": "Rome", "days": 3}}'
    assert streamed("llama3", [text[at : at + size] for at in range(0, len(text), size)]) == ("", CALLS)


@pytest.mark.usefixtures("plugged")
def test_without_tools_nothing_is_held_back_at_the_end():
    parser = call_parser()([], "qwen25")
    assert "".join([parser.parse_stream_chunk("a <tool")[0], parser.parse_stream_end()[0]]) == "a <tool"


THOUGHTS = {
    "apertus2509": "<|inner_prefix|>I think.<|inner_suffix|>Paris.",
    "deepseek-r1": "I think.</think>\n\nParis.",
    "deepseek-v3": "<think>I think.</think>\n\nParis.",
    "deepseek-v4": "<think>I think.</think>Paris.",
    "deepseek-v41": "<think>I think.</think>Paris.",
    "dots": "<think>I think.</think>Paris.",
    "gemma4": "<|channel>thought\nI think.<channel|>Paris.",
    "gigachat35": "I think.</think>Paris.",
    "glm45": "<think>I think.</think>\nParis.",
    "granite_thinking_parser": "<think>I think.</think>\nParis.",
    "hunyuan": "<think>I think.</think>Paris.",
    "inkling": "<|content_thinking|>I think.<|end_message|><|message_model|><|content_text|>Paris.<|content_model_end_sampling|>",
    "interns1": "<think>I think.</think>Paris.",
    "iquest_q1": "<think>I think.</think>Paris.",
    "k2_horizon": "<ifm|think>I think.</ifm|think>Paris.",
    "kimi": "◁think▷I think.◁/think▷Paris.",
    "kimi_k2": "<think>I think.</think>Paris.",
    "kimi_k3": "<|open|>think<|sep|>I think.<|close|>think<|sep|><|open|>response<|sep|>Paris.<|close|>response<|sep|>",
    "ling3": "<think>I think.</think>Paris.",
    "mimo": "<think>I think.</think>Paris.",
    "minimax": "I think.</think>Paris.",
    "minimax-m3": "<mm:think>I think.</mm:think>Paris.",
    "mistral": "[THINK]I think.[/THINK]Paris.",
    "muse": "to=self<|message|>I think.<|eom|><|start|>assistant to=user<|message|>Paris.<|eot|>",
    "nemotron_3": "<think>I think.</think>Paris.",
    "poolside_v1": "<think>I think.</think>Paris.",
    "qwen3": "<think>\nI think.\n</think>\n\nParis.",
    "step3": "I think.</think>Paris.",
    "step3p5": "I think.</think>Paris.",
    "beam": "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>final<|message|>Paris.<|end|>",
}
THOUGHTS_NOT_RECORDED = {
    "gpt-oss": "its parser expects each mark in one piece, and each is one token",
    "cohere_command4": "the same",
    "minimax-append-think": "it leaves the reasoning in the answer",
    "nanbeige": "another name of qwen3",
    "qwen3-thinking": "qwen3 for a model that always thinks",
    "response_template": "reads what a folder's response_template describes",
}


def thoughts(name, pieces):
    parser = reasoning_parser()(name)
    found = [*(parser.parse_stream_chunk(piece) for piece in pieces), parser.parse_stream_end()]
    return tuple("".join(part[side] or "" for part in found).strip() for side in (0, 1))


def test_every_parser_of_reasoning_is_recorded_or_says_why_not():
    assert THOUGHTS.keys() | THOUGHTS_NOT_RECORDED.keys() == set(reasoning_parser().DetectorMap)


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_cut_at_every_position(name):
    text = THOUGHTS[name]
    expected = ("I think.", "Paris.")
    assert [cut for cut in range(len(text) + 1) if thoughts(name, [text[:cut], text[cut:]]) != expected] == []
    assert thoughts(name, list(text)) == expected
