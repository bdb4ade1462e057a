"""Each place where SGLang's serving core asks for CUDA is judged, and each judged place is still there."""

from __future__ import annotations

import importlib.util

import pytest
from support import cuda_checks
from support.cuda_checks import Use, uses

FIELDS = ("module", "function", "condition")


def test_questions_are_told_from_a_tensors_property():
    source = """
_is_cuda = is_cuda()
def store(x):
    if x.is_cuda:
        return
    if x and _is_cuda:
        pass
    return get_platform().is_sm90
class Pool:
    def write(self):
        assert current_platform.is_cuda()
"""
    assert list(uses(source, "pool")) == [
        Use("pool", "", "_is_cuda = is_cuda()"),
        Use("pool", "store", "x and _is_cuda"),
        Use("pool", "store", "return get_platform().is_sm90"),
        Use("pool", "Pool.write", "current_platform.is_cuda()"),
    ]


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_every_use_is_judged_and_none_is_gone():
    record = cuda_checks.verdicts()
    judged = {Use(*(use[field] for field in FIELDS)) for use in record["use"]}
    assert cuda_checks.installed_uses(record["modules"]) == judged
    with pytest.raises(ValueError, match=r"SGLang has no module gone\.py"):
        cuda_checks.installed_uses(["gone.py"])


SERVER = """
import importlib, json, sys
for name in ("launch_server", "srt.entrypoints.http_server", "srt.managers.scheduler", "srt.managers.detokenizer_manager",
             "srt.constrained.xgrammar_backend", "srt.layers.pooler", "srt.mem_cache.swa_memory_pool"):
    importlib.import_module(f"sglang.{name}")
for name in ("speculation.graphs", "attention.kernels_backend", "quantization.nf4", "half_products", "checkpoint.loader"):
    importlib.import_module(f"sglang_pascal.{name}")
loaded = [module.__file__ for name, module in sys.modules.items() if name.startswith("sglang.srt.")]
print(json.dumps([file.rpartition("/sglang/srt/")[2] for file in loaded if file]))
"""


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
@pytest.mark.slow("imports SGLang's server")
def test_every_module_that_a_server_imports_is_judged(in_sglang):
    loaded, record = in_sglang.run(SERVER), cuda_checks.verdicts()
    assert {"managers/scheduler.py", "models/qwen3.py", "layers/layernorm.py"} <= set(loaded)
    assert cuda_checks.unjudged(loaded, record) == set()
    assert cuda_checks.unjudged(loaded, record | {"others": []}) > {"layers/moe/topk.py"}


def test_each_verdict_has_its_reason():
    record = cuda_checks.verdicts()
    for use in record["use"]:
        assert use["verdict"] in cuda_checks.VERDICTS
        assert use["why"]
    assert all(group["why"] for group in record["others"])


def test_the_page_shows_the_data():
    assert (cuda_checks.RESULTS / "cuda-checks.md").read_text() == cuda_checks.page(cuda_checks.verdicts())
