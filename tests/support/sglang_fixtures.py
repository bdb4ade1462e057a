"""Processes that have imported the real SGLang, one of each kind for all tests of a worker.

A pytest plugin (`-p support.sglang_fixtures` in python/pyproject.toml).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.warm_sglang import WORKER, WarmSGLang, warm_sglang

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def in_sglang() -> Iterator[WarmSGLang]:
    """Runs scripts in a real SGLang whose platform is the plugin."""
    with warm_sglang() as process:
        yield process


@pytest.fixture(scope="session")
def sglang_worker() -> Iterator[WarmSGLang]:
    """Runs scripts in a real SGLang that has imported what a worker of the engine imports."""
    with warm_sglang(WORKER) as process:
        yield process
