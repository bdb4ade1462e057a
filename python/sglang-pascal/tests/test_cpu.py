"""The recommended settings of a CPU follow its instruction set."""

from __future__ import annotations

import os

import pytest
from sglang_pascal.cpu import cpu_flags, engine_environment, recommended_cpu_settings


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2"}, "float32"),
        ({"avx2", "avx512f"}, "float32"),
        ({"avx512f", "avx512_bf16"}, "bfloat16"),
        ({"amx_bf16"}, "bfloat16"),
        (set(), "float32"),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(flags, dtype):
    assert recommended_cpu_settings(frozenset(flags), 4).dtype == dtype


def test_one_thread_per_cpu_that_may_be_used():
    assert recommended_cpu_settings(frozenset()).threads == len(os.sched_getaffinity(0))
    assert engine_environment(3)["OMP_NUM_THREADS"] == "3"


def test_flags_of_the_first_cpu(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(path) == {"fpu", "avx2"}
    assert cpu_flags(tmp_path / "none") == frozenset()
