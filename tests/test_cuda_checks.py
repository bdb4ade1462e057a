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


def test_each_verdict_has_its_reason():
    for use in cuda_checks.verdicts()["use"]:
        assert use["verdict"] in cuda_checks.VERDICTS
        assert use["why"]


def test_the_page_shows_the_data():
    assert (cuda_checks.RESULTS / "cuda-checks.md").read_text() == cuda_checks.page(cuda_checks.verdicts())
