"""`pascaline completion`: a script with which a shell completes commands, options and their fixed values."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

from pascaline.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTION = """Print a script that lets a shell complete pascaline's commands and options.

install it for your user:
  bash: pascaline completion bash > ~/.local/share/bash-completion/completions/pascaline
  fish: pascaline completion fish > ~/.config/fish/completions/pascaline.fish
  zsh:  pascaline completion zsh > ~/.pascaline-completion.zsh
        echo '. ~/.pascaline-completion.zsh' >> ~/.zshrc
"""
_BASH = """\
_pascaline() {{
    local words
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _pascaline pascaline
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
"""Lets zsh use completions that are written for bash."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shell."""
    parser.add_argument("shell", choices=("bash", "fish", "zsh"), metavar="SHELL", help="bash, fish or zsh")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    words = dict(_words())
    print(_fish(words) if arguments.shell == "fish" else _bash(words, _ZSH if arguments.shell == "zsh" else ""), end="")
    return ExitCode.OK


def _words() -> Iterator[tuple[str, list[str]]]:
    """Yield (command or "command action", words that may follow it); longer keys before shorter ones, "" last."""
    from pascaline.cli import COMMANDS

    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"pascaline.cli.{name}").add_arguments(parser)
        yield from _words_of(name, parser)
    yield "", [*COMMANDS, "--help", "--version"]


def _words_of(key: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    words = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from _words_of(f"{key} {name}", sub)
        words += [flag for flag in action.option_strings if flag.startswith("--")]
        words += [] if action.option_strings else [str(choice) for choice in action.choices or ()]
    yield key, words


def _bash(words: dict[str, list[str]], prologue: str) -> str:
    cases = []
    for key, found in words.items():
        pattern = f'"{key} "*' if key else "*"
        cases.append(f"        {pattern}) words='{' '.join(found)}' ;;")
    return prologue + _BASH.format(cases="\n".join(cases))


def _fish(words: dict[str, list[str]]) -> str:
    lines = []
    for key, found in words.items():
        seen = " && ".join(f"__fish_seen_subcommand_from {part}" for part in key.split())
        for word in found:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            lines.append(f"complete -c pascaline -n '{seen or '__fish_use_subcommand'}' {what}")
    return "\n".join(lines) + "\n"
