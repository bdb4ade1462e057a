"""The fastest dtype and thread settings for this CPU, as measured with this package's attention backend."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sglang_pascal.device import PLUGIN_NAME

CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class CpuSettings:
    """Settings for SGLang on a CPU."""

    dtype: Literal["bfloat16", "float32"]
    """Value of `--dtype`."""
    threads: int
    """Value of OMP_NUM_THREADS."""
    environment: dict[str, str]
    """Variables of the engine's process."""

    def describe(self) -> dict[str, Any]:
        """Return plain values."""
        return {"dtype": self.dtype, "threads": self.threads}


def recommended_cpu_settings(flags: frozenset[str] | None = None, cpus: int | None = None) -> CpuSettings:
    """Return the fastest settings for a CPU.

    flags: as in /proc/cpuinfo; None = this machine's. cpus: CPUs that this process may use; None = ask the scheduler.
    bfloat16 halves the bytes of each weight, which bound decoding. Without AVX512-BF16 or AMX, torch emulates it, which
    costs more than it saves.
    """
    flags = cpu_flags() if flags is None else flags
    cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
    has_bf16 = bool(flags & {"avx512_bf16", "amx_bf16"})
    return CpuSettings("bfloat16" if has_bf16 else "float32", cpus, engine_environment(cpus))


def engine_environment(threads: int) -> dict[str, str]:
    """Return variables that make SGLang start fast and stay within its threads."""
    return {
        "SGLANG_PLATFORM": PLUGIN_NAME,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        # OpenMP's threads spin for milliseconds after every product, on cores that other programs could use.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Otherwise each of SGLang's processes forks compiler workers of over a gigabyte each, which it never uses.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # After a crash, do not wait a minute for a GPU core dump that nobody requested.
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
    }


def cpu_flags(path: Path = CPU_INFO) -> frozenset[str]:
    """Return the instruction set flags of the first CPU; empty if they cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
