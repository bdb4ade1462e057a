"""The chat templates of a GGUF file as the engine reads them. Each is rendered once before it is used.

A template is a program in the file: one that never ends would block the engine with the first request. It is tried in
a child with limits of time and memory: `python -m sglang_pascal.checkpoint.chat_template`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from gguf_acceptance.keys import TEMPLATE_PREFIX

from sglang_pascal.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

CPU_SECONDS: Final = 10
"""Processor time for the trial; importing the renderer takes 1 to 3 s of it, a template a few milliseconds."""
WALL_SECONDS: Final = 120.0
"""The limit in wall-clock time, for a busy machine."""
MEMORY_BYTES: Final = 4 * 2**30
"""Address space of the trial."""
FURTHER_FOLDER: Final = "additional_chat_templates"
"""Folder in which transformers looks for named templates, beside chat_template.jinja."""
TOOL_USE: Final = "tool_use"
NO_TEMPLATE: Final = (
    "this model has no chat template: send a prompt to the endpoint v1/completions, "
    "or serve a file that carries a chat template"
)
NO_PLAIN_TEMPLATE: Final = (
    "this model has a chat template for requests with tools alone: send tools, or use v1/completions"
)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_UNCOMPILED: Final = 4
_TOO_LARGE: Final = 5
"""Exit codes of the child: for a template that is not a program, and for one that needs more memory."""


def has_template(metadata: dict[str, Any]) -> bool:
    """Whether the file has any chat template."""
    return bool(_named(metadata))


def chat_templates(metadata: dict[str, Any]) -> dict[str, str]:
    """Return path inside the prepared folder -> template.

    SGLang takes one template of several, whatever a request contains, so `tool_use` is joined with the default into one
    that looks for tools itself. A model without a template gets one that says what to do instead.
    """
    named = _named(metadata)
    default, tool_use = named.pop("default", None), named.pop(TOOL_USE, None)
    if tool_use is not None:
        plain = default if default is not None else _raising(NO_PLAIN_TEMPLATE)
        default = f"{{% if tools %}}{_body(tool_use)}{{% else %}}{_body(plain)}{{% endif %}}"
    found = {"chat_template.jinja": _raising(NO_TEMPLATE) if default is None else default}
    return found | {f"{FURTHER_FOLDER}/{name}.jinja": template for name, template in named.items()}


def write_chat_templates(metadata: dict[str, Any], folder: Path) -> None:
    """Write the templates to a folder. Raises CheckpointError for one that is not a program or does not end."""
    templates = chat_templates(metadata)
    if has_template(metadata):
        try_templates(templates)
    for path, template in templates.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(template, encoding="utf-8")


def try_templates(templates: dict[str, str]) -> None:
    """Render each once, with and without tools, in a child that is killed if it takes too long."""
    command = [sys.executable, "-m", "sglang_pascal.checkpoint.chat_template"]
    try:
        trial = subprocess.run(
            command, input=json.dumps(templates), capture_output=True, text=True, timeout=WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise _endless() from exc
    lines = trial.stderr.strip().splitlines()
    if trial.returncode == _UNCOMPILED:
        raise CheckpointError(f"tokenizer.chat_template is no Jinja template: {lines[-1]}; convert the model again")
    if trial.returncode < 0 or trial.returncode == _TOO_LARGE:
        raise _endless()
    if trial.returncode:
        raise CheckpointError(f"tokenizer.chat_template could not be tried: {lines[-1] if lines else 'no output'}")


def _endless() -> CheckpointError:
    return CheckpointError(
        f"tokenizer.chat_template takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 30} GiB for one short message: "
        "it may never end; use a file with another chat template"
    )


def _named(metadata: dict[str, Any]) -> dict[str, str]:
    """Return name -> template; the one without a name is `default`."""
    named = {}
    for key, template in metadata.items():
        name = "default" if key == "tokenizer.chat_template" else key.removeprefix(TEMPLATE_PREFIX)
        if name == key or not template:
            continue
        if _NAME.fullmatch(name) is None:
            raise CheckpointError(f'metadata key "{key}": a template\'s name must be of letters, digits, "_" and "-"')
        named[name] = template
    return named


def _body(template: str) -> str:
    """Return the template without a newline at its end: Jinja drops it there, but not inside another template."""
    return template.removesuffix("\n")


def _raising(message: str) -> str:
    return f'{{{{ raise_exception("{message}") }}}}'


def _trial(templates: dict[str, str]) -> int:
    """Run in the child: return 0 if the templates end, even if they reject the message."""
    import resource

    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    messages = [{"role": "user", "content": "Hello"}]
    parameters = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": parameters}}]
    for template in templates.values():
        for given in (None, tools):
            try:
                render_jinja_template(
                    conversations=[messages], tools=given, chat_template=template, add_generation_prompt=True
                )
            except jinja2.TemplateSyntaxError as error:
                sys.stderr.write(f"line {error.lineno}: {error.message}\n")
                return _UNCOMPILED
            except MemoryError:
                return _TOO_LARGE
            except Exception:  # noqa: S112 - it may need other messages: the engine reports that to the client
                continue
    return 0


if __name__ == "__main__":
    sys.exit(_trial(json.load(sys.stdin)))
