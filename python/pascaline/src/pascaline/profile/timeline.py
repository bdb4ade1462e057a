"""What a profiler recorded: kernels with their times and, if known, the bytes that they moved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["matmul", "attention", "norm", "sampling", "copy", "other"]

# Parts of names that show what a kernel does, the most specific first; our names are those of sglang_pascal/kernels.
_KINDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("copy", ("memcpy", "memset", "copy_", "fill_", "aten::cat", "catarray", "aten::index_put", "repack")),
    ("attention", ("attention", "sdpa", "flash", "fmha", "scaled_dot_product", "paged", "kv_cache", "set_kv")),
    ("sampling", ("argmax", "softmax", "sort", "topk", "multinomial", "sampl", "cumsum", "radix", "exponential")),
    # Our kernels that quantise or dequantise beside other work; "quantize" would otherwise count them as products.
    ("norm", ("norm_quantize", "silu_mul_quantize", "dequantize_q")),
    (
        "matmul",
        (
            "matmul",
            "gemm",
            "gemv",
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "linear",
            "mul_mat",
            "dp4a",
            "cutlass",
            "xmma",
            "splitk",
            "quantize",
        ),
    ),
    ("norm", ("norm", "silu", "gelu", "rope", "rotary", "embedding", "mean", "rsqrt")),
)

CPU = "CPU"
"""Device of a record without GPU kernels."""
KV_CACHE = "KV cache"
"""Name of the bytes that decode attention reads."""
# Names in sglang_pascal/kernels; the numbers are the bits of x and how many rows of x a kernel can hold. Records of
# older releases have no number of bits.
_READS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:decode|tile)_matmul_(\w+?)(?:_\d+bit)?(?:_n\d+)?"), r"\1"),
    (re.compile(r"half_matmul_n\d+"), "F16"),
    (re.compile(r"attention_decode_\w+"), KV_CACHE),
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel; on a CPU, one operator without the operators that it called."""

    name: str
    start: float
    """Seconds from the start of the record."""
    seconds: float
    bytes: int | None
    """Bytes read and written; None if the record does not contain them."""
    stream: int = 0
    operator: str = ""
    """Operator that launched it; empty if unknown, as in a replayed CUDA graph."""

    @property
    def kind(self) -> Kind:
        """What it does: by its operator, because operators have few names; otherwise by its own name."""
        kind = kind_of(self.operator)
        return kind if kind != "other" else kind_of(self.name)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One record."""

    device: str
    """Name of the GPU, or CPU."""
    kernels: tuple[Kernel, ...]
    steps: int
    """Number of decode steps in it; 0 if unknown."""
    device_bandwidth: float | None = None
    """Bytes per second by the driver's report; None if the record does not contain it."""

    @property
    def wall_seconds(self) -> float:
        """Seconds from the first kernel's start to the last one's end."""
        if not self.kernels:
            return 0.0
        return max(k.start + k.seconds for k in self.kernels) - min(k.start for k in self.kernels)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one kernel ran: overlapping kernels count once."""
        total, end = 0.0, float("-inf")
        for kernel in sorted(self.kernels, key=lambda kernel: kernel.start):
            stop = kernel.start + kernel.seconds
            total += max(0.0, stop - max(kernel.start, end))
            end = max(end, stop)
        return total


def kind_of(name: str) -> Kind:
    """Return what a kernel with this name does."""
    lower = name.lower()
    return next((kind for kind, parts in _KINDS if any(part in lower for part in parts)), "other")


def read_by(name: str) -> str | None:
    """Return what kernels with such a name read once in each decode step: all matrices of a tensor type, or the
    KV_CACHE of the running requests. None for a kernel that is not ours, or that reads nothing so large.
    """
    return next((match.expand(what) for pattern, what in _READS if (match := pattern.fullmatch(name))), None)
