"""What SGLang really allocates is what was planned, to the byte; benchmarks/plan_error.py does it for more models."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.warm_sglang import WarmSGLang

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_error
from support.pretended import VARIABLE

pytestmark = [pytest.mark.engine, pytest.mark.slow("starts a real engine of its own")]
needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from sglang.benchmark import one_batch
from sglang_allocations import measure
print(json.dumps(measure(one_batch, sys.argv[2:], does_work=False)))
"""
if TYPE_CHECKING:
    Compare = Callable[..., plan_error.Row]


@pytest.fixture
def compare(sglang_worker: WarmSGLang) -> Compare:
    """plan_error.compare on the CPU; all models are loaded in forks of one process."""
    support = str(Path(__file__).parents[1] / "support")

    def measure(model: Path, flags: list[str]) -> Any:
        return sglang_worker.run(SCRIPT, support, "--model-path", str(model), "--device", "cpu", *flags)

    return partial(plan_error.compare, device="cpu", card=None, measure=measure)


def has_gpu() -> bool:
    """Whether NVIDIA's driver shows a GPU and torch can use it."""
    if not Path("/proc/driver/nvidia/gpus").is_dir() or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@needs_sglang
@pytest.mark.parametrize(("name", "context"), [("qwen2", 512), ("gemma2", 1024), ("qwen3-moe", 2048)])
def test_on_the_cpu_everything_is_equal_to_the_byte(name: str, context: int, compare: Compare, tmp_path: Path) -> None:
    """A padded vocabulary; soft caps and two kinds of layers; experts."""
    shape = replace(plan_error.shapes(large=False)[name], context_length=2048)
    place = plan_error.write_model(tmp_path, name, shape, gguf=None)
    row = compare(place, name, context)
    assert (row.weights_plan, row.kv_plan, row.tables_plan) == (row.weights_true, row.kv_true, row.tables_true)


@needs_sglang
def test_a_gguf_file_is_planned_as_the_plugin_loads_it(compare: Compare, tmp_path: Path) -> None:
    """On the CPU: dequantised, the output tied."""
    shape = plan_error.shapes(large=False)["qwen3"]
    place = plan_error.write_model(tmp_path, "qwen3", shape, gguf="Q4_K_M")
    row = compare(place, "qwen3", 1024)
    assert (row.weights_plan, row.kv_plan, row.tables_plan) == (row.weights_true, row.kv_true, row.tables_true)


@needs_sglang
@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q3_K_M"])
def test_weights_that_stay_quantised_take_what_was_planned(mixture: str, compare: Compare, tmp_path: Path) -> None:
    """As on a GPU: Q3_K is held as Q6_K, rows and columns are padded."""
    shape = replace(plan_error.shapes(large=False)["qwen2"], vocab_size=500)
    place = plan_error.write_model(tmp_path, "qwen2", shape, gguf=mixture)
    row = compare(place, "qwen2", 512, quantization="gguf")
    assert row.weights_plan == row.weights_true


@needs_sglang
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e5m2"])
def test_a_small_kv_type_takes_what_was_planned(kv_dtype: str, compare: Compare, tmp_path: Path) -> None:
    """int8 with its scales."""
    place = plan_error.write_model(tmp_path, "llama", plan_error.shapes(large=False)["llama"], gguf=None)
    row = compare(place, "llama", 512, kv_dtype=kv_dtype)
    assert (row.kv_plan, row.weights_plan) == (row.kv_true, row.weights_true)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="there is no NVIDIA GPU here")
@needs_sglang
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_on_a_gpu_the_total_is_within_what_is_allowed(name: str, tmp_path: Path) -> None:
    """3 % or 150 MiB of what the driver counts; weights and KV cache to the byte.

    A pretended card counts allocations, not what the driver takes for modules, graphs and its own tables: there the plan
    is only known not to be too small.
    """
    place = plan_error.write_model(tmp_path, name, plan_error.shapes(large=True)[name], gguf=None)
    row = plan_error.compare(place, name, 1024, device="cuda", card=None)
    assert row.is_exact
    if VARIABLE in os.environ:
        assert row.total_true <= row.total_plan
    else:
        assert row.total_is_close, (row.total_plan, row.total_true)
