"""Speculation with the real llama-server: our flags, tiny random models, and the same tokens as without."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from pascaline.engines.llama_cpp import speculation
from pascaline.models.reader import read_model
from pascaline.settings import Settings
from support.models import tiny, write_gguf
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    shutil.which("llama-server") is None, reason="llama-server is not on PATH (Debian: llama.cpp-tools)"
)
N_TOKENS = 64
PROMPT = list(range(40, 60)) * 2
"""Token ids. A random model soon repeats itself too."""
FLAGS = ("-c", "512", "-np", "1", "-t", "1", "-ngl", "0", "-fit", "off", "-cram", "0", "--no-warmup", "--metrics")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, and another model with its vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_gguf(folder / f"{name}.gguf", tiny("llama"), "F32", seed=seed)
        for name, seed in (("target", 0), ("other", 1))
    }


@contextmanager
def served(model: Path, log: Path, flags: list[str]) -> Iterator[str]:
    port = free_port()
    command = ["llama-server", "--host", "127.0.0.1", "--port", str(port), "-m", str(model), *FLAGS, *flags]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 60
            while not is_up(url):
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def answered(models: dict[str, Path], log: Path, **speculative: Any) -> tuple[list[int], dict[str, float]]:
    """Return the greedy tokens, and the counters of drafts."""
    given = Settings.model_validate({"engine": "llama.cpp", "speculative": speculative})
    assert speculation.problems(given) == []
    flags = speculation.arguments(speculation.speculation(given, read_model(models["target"])), given)
    body = {"prompt": PROMPT, "n_predict": N_TOKENS, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    with served(models["target"], log, flags) as url:
        answer = httpx.post(f"{url}/completion", json=body, timeout=120).json()
        page = httpx.get(f"{url}/metrics").text
    found = re.findall(r"^llamacpp:spec_decode_num_(\w+)_total (\S+)$", page, re.MULTILINE)
    return answer["tokens"], {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    tokens, counters = answered(models, tmp_path_factory.mktemp("alone") / "log")
    assert len(tokens) == N_TOKENS
    assert not any(counters.values())
    return tokens


def test_lookup_gives_the_same_tokens(models: dict[str, Path], alone: list[int], tmp_path: Path) -> None:
    tokens, _ = answered(models, tmp_path / "log", method="lookup")
    assert tokens == alone


def test_a_draft_that_is_the_model_itself_is_always_right(
    models: dict[str, Path], alone: list[int], tmp_path: Path
) -> None:
    tokens, counters = answered(models, tmp_path / "log", method="draft", draft_model=str(models["target"]))
    assert tokens == alone
    assert counters["accepted_tokens"] >= 0.9 * counters["draft_tokens"] > 0
    assert counters["drafts"] < N_TOKENS / 2


def test_a_draft_that_is_another_model_changes_no_token(
    models: dict[str, Path], alone: list[int], tmp_path: Path
) -> None:
    tokens, counters = answered(models, tmp_path / "log", method="draft", draft_model=str(models["other"]))
    assert tokens == alone
    assert counters["accepted_tokens"] < counters["draft_tokens"]


def test_heads_that_the_file_does_not_have_are_refused_by_it(models: dict[str, Path], tmp_path: Path) -> None:
    """Why the plan refuses them first: here it ends with a message of its own."""
    log = tmp_path / "log"
    with pytest.raises(AssertionError), served(models["target"], log, ["--spec-type", "draft-mtp"]):
        pytest.fail("it serves without heads")
    assert "mtp" in log.read_text().lower()
