"""Ports and versions have one home each; code derives them, and the pages are held to them here."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from pascaline.defaults import PORTS, SETTINGS
from pascaline.engines import ENGINES
from pascaline.plugin import PLUGIN
from pascaline.settings import Settings

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("python/*/src/**/*.py"))
MODULES = sorted([*ROOT.glob("modules/**/*.nix"), *ROOT.glob("hosts/*.nix")])
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("python/*/README.md")])
PINS = {
    "sglang": PLUGIN.sglang[-1],
    "bitsandbytes": PLUGIN.bitsandbytes,
    "torch": json.loads((ROOT / "python/wheels.json").read_text())["wheels"]["torch"]["version"],
}
OWN_PORTS = {port for name, port in asdict(PORTS).items() if name not in ("between_instances", "grafana")}
MEASURED = re.compile(r"driver \d{3}\.")
"""A line that says on what something was measured, which stays as it was."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "python")))
def test_code_repeats_no_port(path: Path) -> None:
    tree = ast.walk(ast.parse(path.read_text()))
    assert [node.value for node in tree if isinstance(node, ast.Constant) and node.value in OWN_PORTS] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nix_repeats_no_port(path: Path) -> None:
    assert re.findall(rf"\b(?:{'|'.join(map(str, sorted(OWN_PORTS)))})\b", path.read_text()) == []


def test_code_repeats_no_version_of_sglang() -> None:
    """The plugin's own metadata says it, and its facts repeat that."""
    assert [path for path in (*SOURCES, *MODULES) if PLUGIN.sglang[-1] in path.read_text()] == []


def test_the_defaults_that_nix_reads_are_those_of_the_settings() -> None:
    settings = Settings()
    assert {name: getattr(settings, name) for name in SETTINGS} == SETTINGS
    assert (settings.port, settings.agent_port) == (PORTS.engine, PORTS.agent)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_the_pinned_versions(path: Path) -> None:
    for line in path.read_text().splitlines():
        if MEASURED.search(line):
            continue
        for package, version in re.findall(r"\b(sglang|bitsandbytes|torch)(?: |==)(\d+\.\d+\.\d+)\b", line.lower()):
            assert (package, version) == (package, PINS[package]), line


def test_the_lock_has_the_sglang_of_the_plugin() -> None:
    wheels = json.loads((ROOT / "python/wheels.json").read_text())["wheels"]
    assert wheels["sglang"]["version"] == PLUGIN.sglang[-1]
    required = tomllib.loads((ROOT / "python/sglang-pascal/pyproject.toml").read_text())["project"]["dependencies"]
    assert [each for each in required if each.startswith("sglang")] == [f"sglang=={PLUGIN.sglang[-1]}"]


def test_types_of_the_kv_cache_stand_in_the_data_of_the_engines() -> None:
    """Settings, planning and flags read them from there; the plugin's own package has its names and bytes."""
    names = set().union(*(engine.data.kv_types for engine in ENGINES.values())) - {"fp16"}
    source = ROOT / "python/pascaline/src/pascaline"
    # A GGUF file's metadata has an int8 of its own.
    files = [path for path in SOURCES if path.is_relative_to(source) and not path.is_relative_to(source / "models")]
    literals = [
        (str(path.relative_to(source)), node.value)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert literals == []
    assert {"fp8_e5m2", "int8", "bf16"} <= names
