"""Weights, KV cache and compute buffer of a plan against what a real llama-server says that it allocates.

Sparse files of published shapes with two layers, served on the CPU: nothing of the buffers depends on the number of
layers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from pascaline.cards import load_card
from pascaline.models.gguf import read_gguf
from pascaline.planning import make_plan
from support.models import SHAPES, write_gguf
from support.planning import request
from support.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
SERVER = shutil.which("llama-server")
_BUFFER = re.compile(r"(model|KV|compute) buffer size = +([0-9.]+) MiB")

pytestmark = pytest.mark.skipif(SERVER is None, reason="llama-server is not on PATH (Debian: llama.cpp-tools)")


def allocated(path: Path, context: int, requests: int, batch: int) -> dict[str, float]:
    """Return MiB by purpose from the server's log, read until it answers."""
    assert SERVER is not None
    sizes = ["--ctx-size", str(context * requests), "--parallel", str(requests)]
    sizes += ["--batch-size", str(batch), "--ubatch-size", str(batch)]
    how = ["--flash-attn", "on", "--no-warmup", "--fit", "off", "--verbosity", "4", "--port", str(free_port())]
    with subprocess.Popen(
        [SERVER, "--model", str(path), *sizes, *how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if "compute buffer size" in line and "loading model tensors" in text:
                break
        process.kill()
    found: dict[str, float] = {}
    for what, size in _BUFFER.findall(text.rpartition("loading model tensors")[2]):
        found[what] = round(found.get(what, 0.0) + float(size), 2)
    return found


@pytest.mark.parametrize(
    ("name", "context", "requests", "batch"),
    [
        ("llama-3.1-8b", 4096, 1, 512),
        ("qwen3-4b", 2048, 4, 128),
        ("gemma-2-9b", 4096, 1, 512),
        ("llama-2-7b", 4096, 1, 2048),
    ],
)
def test_the_plan_is_what_it_allocates(name: str, context: int, requests: int, batch: int, tmp_path: Path) -> None:
    shape = replace(SHAPES[name], num_hidden_layers=2)
    path = write_gguf(tmp_path / "m.gguf", shape, "Q4_K_M", sparse=True)
    wanted = request(
        load_card("cpu"), engine="llama.cpp", device="cpu", card_bytes=64 * 2**30, context_length=context,
        max_running_requests=requests, chunked_prefill_tokens=batch,
    )  # fmt: skip
    plan = make_plan(read_gguf(path), load_card("cpu"), wanted)
    log = allocated(path, context, requests, batch)
    assert plan.kv_bytes / MIB == pytest.approx(log["KV"], abs=0.005)
    planned = plan.part("activations") / MIB
    assert log["compute"] <= planned <= 1.05 * log["compute"]
