"""A real bash completes commands, actions and options from the printed script."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from pascaline.cli import COMMANDS, main

if TYPE_CHECKING:
    from pathlib import Path


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pascaline ", {*COMMANDS, "--help", "--version"}),
        ("pascaline mod", {"models"}),
        ("pascaline models a", {"add"}),
        ("pascaline models add --sh", {"--sha256"}),
        ("pascaline serve --agent-p", {"--agent-port"}),
        ("pascaline serve --port 8000 --radix", {"--radix-cache"}),
        ("pascaline completion f", {"fish"}),
        ("pascaline serve --nothing-like-this", set()),
    ],
)
def test_bash_completes(line: str, expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script").write_text(script("bash", capsys))
    words = line.split(" ")
    program = (
        f". {tmp_path}/script; COMP_WORDS=({' '.join(words[:-1])} '{words[-1]}'); COMP_CWORD={len(words) - 1}; "
        '_pascaline; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


def test_zsh_reads_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    prologue, _, rest = script("zsh", capsys).partition("\n")
    assert prologue == "autoload -Uz compinit bashcompinit && compinit && bashcompinit"
    assert rest == script("bash", capsys)


def test_fish_has_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    lines = script("fish", capsys).splitlines()
    for command in COMMANDS:
        assert f"complete -c pascaline -n '__fish_use_subcommand' -a {command}" in lines
    both = "__fish_seen_subcommand_from models && __fish_seen_subcommand_from add"
    assert f"complete -c pascaline -n '{both}' -l sha256" in lines


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed: apt install fish")
def test_fish_accepts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pascaline.fish").write_text(script("fish", capsys))
    subprocess.run(["fish", "--no-execute", tmp_path / "pascaline.fish"], check=True, timeout=60)
