"""A third engine is one folder: linked beside the two that there are, every command knows it, and no other file changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pascaline
import pytest
from support.instance import FAKE_ENGINE, running

SOURCE = Path(pascaline.__file__).parent
FOLDER = FAKE_ENGINE.parent / "engine"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which `pascaline` is this checkout's package with one more folder in engines/."""
    root = tmp_path_factory.mktemp("packages")
    engines = root / "pascaline/engines"
    engines.mkdir(parents=True)
    for source, target in ((SOURCE, root / "pascaline"), (SOURCE / "engines", engines)):
        for path in source.iterdir():
            if not (target / path.name).exists() and path.name != "__pycache__":
                (target / path.name).symlink_to(path)
    (engines / "fake").symlink_to(FOLDER)
    return {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def pascaline_says(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "pascaline", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_setting_and_its_schema_know_it(environment: dict[str, str]) -> None:
    schema = json.loads(pascaline_says(environment, "config", "schema"))
    assert schema["properties"]["engine"]["enum"] == ["sglang", "fake", "llama.cpp"]


def test_a_plan_has_its_parts_and_its_flags(environment: dict[str, str], model: Path) -> None:
    words = ("--engine", "fake", "--device", "cpu", "--context", 256, "--requests", 2, "--json")
    plan = json.loads(pascaline_says(environment, "plan", model, *words))
    assert plan["engine"] == "fake"
    assert plan["engine_args"] == ["--context-length", "256", "--max-total-tokens", "512"]
    assert [part["key"] for part in plan["parts"]] == ["weights", "kv_pool", "process"]


def test_it_is_served_and_supervised(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    settings = {"engine": "fake", "engine_executable": FAKE_ENGINE, "device": "cpu", "drain_timeout": 20}
    with running(tmp_path, environment=environment, model=model, **settings) as instance:
        instance.wait_for_state("ready")
        assert instance.api("/v1/completions", {"model": "tiny.gguf", "prompt": "a", "max_tokens": 2}).status == 200
        assert instance.health()["engine"] == "fake"
        assert "fake:num_running_reqs" in instance.api("/metrics").text
        assert instance.stop() == 0
