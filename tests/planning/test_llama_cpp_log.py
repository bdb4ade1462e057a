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
from support.catalog_files import shape_named, write_catalog_file
from support.models import SHAPES, write_gguf
from support.planning import request
from support.ports import free_port

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
SERVER = shutil.which("llama-server")
_BUFFER = re.compile(r"(model|KV|RS|compute) buffer size = +([0-9.]+) MiB")

pytestmark = pytest.mark.skipif(SERVER is None, reason="llama-server is not on PATH (Debian: llama.cpp-tools)")


def allocated(path: Path, context: int, requests: int, batch: int, *extra: str) -> dict[str, float]:
    """Return MiB by purpose from the server's log, read until it answers. extra: further flags."""
    assert SERVER is not None
    sizes = ["--ctx-size", str(context * requests), "--parallel", str(requests)]
    sizes += ["--batch-size", str(batch), "--ubatch-size", str(batch)]
    how = ["--flash-attn", "on", "--no-warmup", "--fit", "off", "--verbosity", "4", "--port", str(free_port()), *extra]
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


@pytest.mark.slow("half a minute: eight servers map up to 2 GB of holes each")
@pytest.mark.parametrize(
    ("name", "layers", "experts"),
    [
        ("Qwen3-30B-A3B", 2, 128),
        ("Qwen3.6-35B-A3B", 4, 32),
        ("gpt-oss-20b", 2, 32),
        ("Mixtral-8x7B", 2, 8),
        ("GLM-4.5-Air", 2, 16),
        # llama.cpp knows the one without a low-rank query by its 27 layers.
        ("DeepSeek-V2-Lite", 27, 8),
        ("Qwen3.5-9B", 4, None),
        ("Qwen3-14B", 2, None),
    ],
)
def test_shapes_of_the_catalogue(name: str, layers: int, experts: int | None, tmp_path: Path) -> None:
    """Weights, KV cache and recurrent state to the hundredth of a MiB that the log has; compute buffers never below.

    Nothing here depends on the number of experts that no token uses, so some
    files have fewer. gpt-oss-120b is gpt-oss-20b with more layers and experts.
    """
    shape = shape_named(name, layers) | ({"experts": experts} if experts else {})
    spec = read_gguf(write_catalog_file(tmp_path / "m.gguf", shape))
    wanted = request(
        load_card("cpu"), engine="llama.cpp", device="cpu", card_bytes=64 * 2**30, context_length=4096,
        max_running_requests=1, chunked_prefill_tokens=512,
    )  # fmt: skip
    plan = make_plan(spec, load_card("cpu"), wanted)
    log = allocated(tmp_path / "m.gguf", 4096, 1, 512, "--no-repack")
    assert plan.weights_bytes / MIB == pytest.approx(log["model"], abs=0.02)
    assert plan.kv_bytes / MIB == pytest.approx(log["KV"] + log.get("RS", 0.0), abs=0.01)
    planned = plan.part("activations") / MIB
    assert log["compute"] <= planned <= 1.7 * log["compute"]
