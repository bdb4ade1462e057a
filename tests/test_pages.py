"""The commands in the pages' fenced `sh` blocks: each one runs here, or stands in a table with the reason why it cannot."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.models import SHAPES, write_gguf

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "python/*/README.md", ".github/ISSUE_TEMPLATE/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FOLDERS = {"/data/models/": "", "/etc/pascaline/": ""}
"""Folders of the pages' hosts -> where the test keeps the same files."""

CANNOT: dict[str, str] = {
    r"(sudo|systemctl|journalctl|nvidia-smi) .*": "changes or reads the services and the driver of a real host",
    r"(ssh|scp|nixos-rebuild|nixos-generate-config) .*|mkdir \w+ && cd \w+ && nix .*|\$EDITOR .*|\(umask .*": "needs a NixOS host and its owner",
    r"git clone .*": "fetches from the network",
    r"(PASCALINE_ENV=\S+ )?\S*dev (sync|hooks|test|serve)\b.*": "tests/bare runs it on a machine of its own",
    r"export .*": "a setting of the reader's shell",
    r"curl .*": "needs an instance on the default port",
    r"pascaline plan https://.*": "fetches from the network",
    r"pascaline plan --measure-host": "needs an idle host and gigabytes; test_host_bandwidth.py does it on a small scale",
    r"pascaline top\b.*": "needs a terminal",
    r"pascaline bench .*": "measures for minutes, or compares what was measured; tests/bench does both on a small scale",
    r"((\S*/)?|uv )pip install .*|python3 -m venv .*": "changes the environment that the tests run in",
    r"python -m sglang_pascal\.kernels\.build .*|uv build .*": "takes minutes; test_kernels_build.py builds what it needs",
    r"sglang-pascal prepare .*": "needs a whole model; test_prepare.py prepares small ones",
    r"python -m sglang\.launch_server .*": "serves until it is stopped; tests/engine of the plugin starts it",
    r"pascaline serve .*": "serves until it is stopped; tests/serve starts it",
    r"\./dev exec python benchmarks/.*": "measures a Pascal card",
}
"""What cannot run in a test -> why."""
NIXOS = re.compile(r"docs/(nixos|first-switch).*\.md")
"""Pages whose commands are for NixOS hosts."""
ON_NIXOS = "needs a NixOS host; tests/nix evaluates what the page switches to"
MODULES = {"pascaline": "pascaline", "sglang-pascal": "sglang_pascal"}
"""Our commands -> the modules that run them."""
EXIT_CODES = {"pascaline doctor": {0, 1, 10}}
"""Commands whose exit code says what they found on this host; all others end with 0."""


class Command(NamedTuple):
    """A line of a page."""

    page: str
    text: str


def commands() -> list[Command]:
    """Every command of every fenced sh block, without comments; a backslash continues a line."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            texts = (re.sub(r"(^|\s{2,})#.*", "", line).strip() for line in lines)
            found += [Command(str(page.relative_to(ROOT)), text) for text in texts if text]
    return found


COMMANDS = commands()


def reasons(command: Command) -> list[str]:
    """Return why a command cannot run in a test; an empty list if it can."""
    if NIXOS.fullmatch(command.page):
        return [ON_NIXOS]
    return [reason for pattern, reason in CANNOT.items() if re.fullmatch(pattern, command.text)]


def test_the_pages_have_commands_that_run() -> None:
    assert len([command for command in COMMANDS if not reasons(command)]) >= 10


def test_every_reason_is_needed() -> None:
    elsewhere = [command.text for command in COMMANDS if not NIXOS.fullmatch(command.page)]
    unused = [pattern for pattern in CANNOT if not any(re.fullmatch(pattern, text) for text in elsewhere)]
    assert unused == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("pages")
    write_gguf(folder / "emily.Q4_K_M.gguf", SHAPES["mistral-7b"], "Q4_K_M", sparse=True)
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```toml\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    settings = re.sub(r'^model_sha256 = "…".*\n', "", example, flags=re.MULTILINE)
    (folder / "api-key").write_text("secret\n")
    for name, place in FOLDERS.items():
        settings = settings.replace(name, f"{folder}/{place}")
    (folder / "emily.toml").write_text(settings)
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text}")
def test_the_command_runs(command: Command, folder: Path) -> None:
    """A command that cannot run here is skipped, so that the summary says how many were left out and why."""
    if why := reasons(command):
        pytest.skip(why[0])
    text = command.text
    for name, place in FOLDERS.items():
        text = text.replace(name, place)
    words = shlex.split(text)
    assert words[0] in MODULES, f"no reason in CANNOT, and no command of ours: {command.text}"
    if not shutil.which(words[0]):
        words = [sys.executable, "-m", MODULES[words[0]], *words[1:]]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    expected = EXIT_CODES.get(" ".join(command.text.split()[:2]), {0})
    assert done.returncode in expected, done.stdout[-2000:] + done.stderr[-2000:]
