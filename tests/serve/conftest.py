"""Instances of `pascaline serve` on the fake engine, with waiting times that suit a test."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.errors import ExitCode
from support.instance import FAKE_ENGINE, Instance, running
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMPATIENT: dict[str, Any] = {
    "engine_executable": FAKE_ENGINE,
    "device": "cpu",
    "probe_interval": 0.5,
    "stall_timeout": 3,
    "drain_timeout": 20,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file of some hundred KiB."""
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny("llama"), "Q8_0")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Instance]:
    """One instance for the tests of a file that do not spoil it; whatever they did, it ends in order."""
    with running(tmp_path_factory.mktemp("shared"), **{"model": model} | IMPATIENT) as instance:
        instance.wait_for_state("ready")
        yield instance
        assert instance.stop() == ExitCode.OK


@pytest.fixture
def serve(tmp_path: Path, model: Path) -> Iterator[Callable[..., Instance]]:
    """Start an instance with some settings; at the end none of its processes and files may be left."""
    with contextlib.ExitStack() as instances:

        def start(**settings: Any) -> Instance:
            return instances.enter_context(running(tmp_path, **({"model": model} | IMPATIENT | settings)))

        yield start
