"""After the engine ran out of memory: which smaller settings come next, and when they help."""

from __future__ import annotations

import pytest
from pascaline.engines import Cause, Diagnosis
from pascaline.planning import make_plan
from pascaline.planning.nearest import SHRINKABLE, next_smaller
from pascaline.serving.failure import Ending
from pascaline.serving.shrink import helps, with_values
from pascaline.settings import KvCacheSettings, Settings
from support.planning import LLAMA_3_8B, P4, QWEN_3_4B, request


@pytest.mark.parametrize("engine", ["sglang", "llama.cpp"])
@pytest.mark.parametrize("spec", [LLAMA_3_8B, QWEN_3_4B])
def test_each_step_needs_less_until_there_is_none(engine: str, spec: object) -> None:
    plan = make_plan(spec, P4, request(engine=engine))  # type: ignore[arg-type]
    totals = [plan.total_bytes]
    for _ in range(200):
        change = next_smaller(spec, P4, plan)  # type: ignore[arg-type]
        if change is None:
            break
        assert set(change.settings) <= SHRINKABLE
        assert change.plan.fits
        plan = change.plan
        totals.append(plan.total_bytes)
    else:
        pytest.fail("it never ends")
    assert len(totals) > 2
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_the_first_step_is_a_smaller_pool() -> None:
    plan = make_plan(QWEN_3_4B, P4, request())
    change = next_smaller(QWEN_3_4B, P4, plan)
    assert change is not None
    assert set(change.settings) == {"kv_cache.max_tokens"}
    assert change.settings["kv_cache.max_tokens"] < plan.kv_tokens


def test_values_become_settings() -> None:
    before = Settings(kv_cache=KvCacheSettings(max_bytes=2**30, dtype="int8"), context_length=4096)
    after = with_values(before, {"kv_cache.max_tokens": 2048, "context_length": 2048})
    assert after.kv_cache == KvCacheSettings(max_tokens=2048, max_bytes=None, dtype="int8")
    assert after.context_length == 2048
    assert with_values(before, {"chunked_prefill_tokens": 128}).kv_cache == before.kv_cache


@pytest.mark.parametrize(
    ("cause", "device", "leak", "helped"),
    [
        (Cause.DEVICE_MEMORY, "cuda", None, True),
        (Cause.HOST_MEMORY, "cuda", None, False),
        (Cause.HOST_MEMORY, "cpu", None, True),
        (None, "cpu", None, True),
        (None, "cuda", None, False),
        (Cause.DEVICE_MEMORY, "cuda", "its memory grew", False),
    ],
)
def test_it_helps_where_the_planned_memory_ran_out(
    cause: Cause | None, device: str, leak: str | None, helped: bool
) -> None:
    ending = Ending(exit_code=-9, diagnosis=Diagnosis(cause, "x") if cause else None, leak=leak, oom_kills=1)
    assert helps(ending, device) is helped
