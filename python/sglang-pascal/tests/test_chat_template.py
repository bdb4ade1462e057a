"""Every chat template of the file reaches the engine, and one that never ends does not."""

from __future__ import annotations

import jinja2
import pytest
from sglang_pascal.checkpoint import chat_template as module
from sglang_pascal.checkpoint.chat_template import chat_templates, has_template, try_templates
from sglang_pascal.errors import CheckpointError

KEY = "tokenizer.chat_template"
MESSAGES = [{"role": "user", "content": "Weather?"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
DEFAULT = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
TOOL_USE = "{% for t in tools %}TOOL {{ t.function.name }} {% endfor %}" + DEFAULT


def render(template: str, tools: list | None = None) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(conversations=[MESSAGES], tools=tools, chat_template=template)[0][0]


def main_template(**templates: str) -> str:
    return chat_templates({f"{KEY}.{name}" if name else KEY: text for name, text in templates.items()})[
        "chat_template.jinja"
    ]


def test_one_template_is_written_as_it_is():
    assert chat_templates({KEY: DEFAULT}) == {"chat_template.jinja": DEFAULT}


@pytest.mark.parametrize("default", [KEY, f"{KEY}.default"])
def test_the_template_for_tools_is_taken_when_there_are_tools(default):
    template = chat_templates({default: DEFAULT, f"{KEY}.tool_use": TOOL_USE})["chat_template.jinja"]
    assert render(template) == render(DEFAULT) == "Weather?"
    assert render(template, TOOLS) == render(TOOL_USE, TOOLS) == "TOOL get_weather Weather?"


def test_others_can_be_chosen_by_name():
    found = chat_templates({KEY: DEFAULT, f"{KEY}.rag": "R"})
    assert found == {"chat_template.jinja": DEFAULT, "additional_chat_templates/rag.jinja": "R"}


@pytest.mark.parametrize("metadata", [{}, {KEY: ""}, {"tokenizer.chat_templates": []}])
def test_a_model_without_a_template_says_what_to_do(metadata):
    assert not has_template(metadata)
    with pytest.raises(jinja2.TemplateError, match="endpoint v1/completions"):
        render(chat_templates(metadata)["chat_template.jinja"])


def test_a_template_for_tools_alone_says_so_without_tools():
    template = chat_templates({f"{KEY}.tool_use": TOOL_USE})["chat_template.jinja"]
    assert render(template, TOOLS) == "TOOL get_weather Weather?"
    with pytest.raises(jinja2.TemplateError, match="for requests with tools alone"):
        render(template)


@pytest.mark.parametrize("name", ["../x", "", "a b"])
def test_a_name_that_is_no_file_is_refused(name):
    with pytest.raises(CheckpointError, match="a template's name must be"):
        chat_templates({f"{KEY}.{name}": DEFAULT})


def test_templates_that_end_are_accepted_whether_they_like_the_message_or_not():
    try_templates({"a": DEFAULT, "b": "{{ raise_exception('a system message first') }}", "c": "{{ messages[9].role }}"})


def test_what_is_no_template_is_refused():
    with pytest.raises(CheckpointError, match="is no Jinja template: line 1: "):
        try_templates({"a": "{% for %}"})


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            marks=pytest.mark.slow("takes all the seconds that a template may have"),
        ),
        "{% for a in range(99999) %}{{ 'x' * 99999999 }}{% endfor %}",
    ],
)
def test_one_that_never_ends_is_killed(endless, monkeypatch):
    monkeypatch.setattr(module, "WALL_SECONDS", 15.0)
    with pytest.raises(CheckpointError, match="it may never end; use a file with another chat template"):
        try_templates({"a": endless})
