"""The plugin is the source of what it can do: pascaline's copy of its facts is the plugin's own output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pascaline import plugin

REMEDY = "run ./dev facts, and commit python/pascaline/src/pascaline/plugin.json"


def test_the_copy_is_what_the_plugin_says() -> None:
    facts = pytest.importorskip("sglang_pascal.facts", reason="sglang-pascal is not installed (./dev sync)")
    copy = json.loads((Path(plugin.__file__).parent / "plugin.json").read_text())
    assert copy == facts.collect(), REMEDY


def test_every_fact_has_a_place_in_the_types() -> None:
    """A fact that nothing reads is dropped from the plugin's output, or given a field."""
    text = json.dumps(json.loads((Path(plugin.__file__).parent / "plugin.json").read_text()))
    read: set[str] = set()

    class Recorder(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> object:
            read.add(key)
            return super().__getitem__(key)

    facts = json.loads(text, object_hook=Recorder)
    plugin.parse(facts)
    assert set(facts) - read == set(), REMEDY
