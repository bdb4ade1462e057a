"""`./dev try-sglang`: what it says of a shim, and the copy in which it changes the pin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "python"))

import try_sglang  # noqa: E402
from try_sglang import Scratch, State, as_markdown, judge, page, version  # noqa: E402

SHIM = {"name": "seeds", "needed": True, "applied": True, "error": ""}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("needed, applied", "")),
        ({"needed": False, "applied": False}, ("not needed", "")),
        ({"applied": False}, ("broken", "it is not in place after the start")),
        ({"error": "AttributeError: no Sampler"}, ("broken", "AttributeError: no Sampler")),
    ],
)
def test_the_state_of_a_shim(change: dict[str, object], expected: tuple[str, str]) -> None:
    assert judge(SHIM | change) == expected


def test_a_shim_of_one_device_has_no_state_on_the_other() -> None:
    states = [State("seeds", "cpu", "needed, applied"), State("is_cuda", "cuda", "broken", "a | b")]
    assert as_markdown(states).splitlines() == [
        "| shim | cpu | cuda |",
        "|---|---|---|",
        "| seeds | needed, applied | not used |",
        "| is_cuda | not used | broken: a   b |",
    ]
    assert "No test was run." in page("0.5.24", states, "")


@pytest.mark.parametrize("text", ["0.5.24", "0.6.0rc1", "0.5.23.post1"])
def test_versions(text: str) -> None:
    assert version(text) == text


@pytest.mark.parametrize("text", ["../0.5", "newest", "0.5.24; rm", ""])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        version(text)


def test_the_copy_pins_the_version_and_leaves_packages_out(tmp_path: Path) -> None:
    Scratch(tmp_path, "0.5.24", "uv", ["cuda-tile"])._copy_sources()
    assert '"sglang==0.5.24"' in (tmp_path / "python/sglang-pascal/pyproject.toml").read_text()
    assert "\"cuda-tile; sys_platform == 'never'\"" in (tmp_path / "python/pyproject.toml").read_text()
    assert (tmp_path / "python/pascaline/src/pascaline/plugin.json").is_file()


def test_a_start_that_prints_nothing_is_told_by_its_last_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: sglang' >&2\nexit 1\n")
    python.chmod(0o700)
    assert try_sglang.shim_states(python, "cpu") == [
        State("(start of SGLang)", "cpu", "broken", "ModuleNotFoundError: sglang")
    ]
