"""Sorts the names of launched GPU kernels by who compiled them, and holds them against the locked wheels.

A name is *ours* if docs/kernels.md lists it (a test compares that table with the sources), *torch* if the locked
libtorch_cuda.so holds such a kernel for sm_60, *bitsandbytes* if its library does, *cuBLAS* if a matrix product of torch
launched it, and else *unknown*. Flash attention, cuDNN and Triton are *forbidden*, whatever a library holds: torch
compiles their kernels for sm_60 too, with empty bodies.

Another release of torch has other template parameters and lambda numbers. So a name that is not found as a whole is
compared by its parts: the kernel's own name, and the names of torch's functions and functors among its parameters.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_pascal.card_code import bitsandbytes_library
from sglang_pascal.machine_code import Code, kernel_names

if TYPE_CHECKING:
    from collections.abc import Iterable

PASCAL = Code("sm", 60)
FORBIDDEN = re.compile(r"flash|fmha|cudnn|cutlassF|triton|_fwd_kernel|bfloat16|wgmma", re.IGNORECASE)
PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mv|addmv|dot)$")
BITSANDBYTES = re.compile(
    r"^(void )?k(gemm_4bit_inference_naive|QuantizeBlockwise\w*|DequantizeBlockwise|gemmm?_\w+)\b"
)
SUCCESSORS = {
    "CatArrayBatchedCopy_alignedK_contig": "CatArrayBatchedCopy_aligned16_contig",
    "CatArrayBatchedCopy_vectorized": "CatArrayBatchedCopy_aligned16_contig",
    "computeBlockDigitCounts": "radixFindKthValues",
    "computeDigitCumSum": "radixFindKthValues",
    "vectorized_gather_kernel": "index_elementwise_kernel",
}
"""Kernel that only newer releases of torch have -> the one by which the locked torch computes the same operator
(aten::cat, topk and index)."""
_KERNELS_PAGE = Path(__file__).parents[2] / "docs/kernels.md"
_NAME = re.compile(r"(?<!\w)[A-Za-z_]\w*(?:::[A-Za-z_~]\w*)*")
_TYPES = re.compile(
    r"^(std::|c10::|char$|short$|int$|long$|float$|double$|bool$|unsigned$|signed$|void$|const$|true$|false$|lambda$|"
    r"operator$|at::Tensor|at::detail::Array$|at::native::Memory$|at::native::memory::|at::cuda::detail::|"
    r"OffsetCalculator$|TrivialOffsetCalculator$|at::cuda::Array$|cuda::std::|thrust::|cub::)"
)
"""Element types, containers and index arithmetic: what differs between releases and says nothing about the work."""


@dataclass(frozen=True)
class Match:
    """Whose a kernel is, and how it was recognised."""

    owner: str
    """ours, torch, cuBLAS, bitsandbytes, forbidden or unknown."""
    how: str
    """name: the same whole name; parts: the same kernel and functors; operator: by what launched it; successor: the
    locked torch computes the operator by the kernel that SUCCESSORS names."""


def classify(name: str, operators: Iterable[str], torch_names: Index, own: frozenset[str]) -> Match:
    """Return whose a kernel is. operators: torch's operators that launched it."""
    if name in own:
        return Match("ours", "name")
    if FORBIDDEN.search(name):
        return Match("forbidden", "name")
    if how := torch_names.find(name):
        return Match("torch", how)
    if BITSANDBYTES.match(name):
        return Match("bitsandbytes", "name")
    if any(PRODUCTS.match(operator) for operator in operators):
        return Match("cuBLAS", "operator")
    return Match("unknown", "")


class Index:
    """The kernels of a library, by their whole names and by their parts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._whole = {plain(name) for name in names}
        self._parts = {parts(name) for name in self._whole}
        self.kernels = {base for base, _ in self._parts}
        """Without parameters."""

    def find(self, name: str) -> str:
        """Return how a name was found: name, parts or successor; empty if it was not."""
        if plain(name) in self._whole:
            return "name"
        if parts(plain(name)) in self._parts:
            return "parts"
        return "successor" if SUCCESSORS.get(parts(plain(name))[0]) in self.kernels else ""


def plain(name: str) -> str:
    """Return a demangled name without what a build adds: namespaces that hold a hash or a list of architectures."""
    name = re.sub(r"CUB_\w+?_NS::|THRUST_\w+?_NS::|at_cuda_detail::", "", name)
    return re.sub(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N__\w+?::", "", name).removeprefix("void ")


def parts(name: str) -> tuple[str, frozenset[str]]:
    """Return the kernel's own name, and the functions and functors among its template parameters."""
    base, _, rest = name.partition("<")
    base = base.partition("(")[0]
    parameters = rest[: _end_of_parameters(rest)]
    words = {word.rpartition("::")[2] for word in _NAME.findall(parameters) if not _TYPES.match(word)}
    return base.rpartition("::")[2], frozenset(word for word in words - _IGNORED if not _TUNING.fullmatch(word))


_TUNING = re.compile(r"Policy\d+|Device\w+Policy|policy_hub")
"""CUB's tables of tile sizes, of which each release and card has its own."""
_IGNORED = {"TensorIteratorBase", "TensorIterator", "OffsetCalculator", "TrivialOffsetCalculator", "LoadWithoutCast"}
_IGNORED |= {"StoreWithoutCast", "LoadWithCast", "StoreWithCast", "Array", "uint4", "ulonglong2", "half", "__half"}


def _end_of_parameters(text: str) -> int:
    """Where the template parameters end that begin before the text."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "<") - (character == ">" and text[position - 1 : position] != "-")
        if depth == 0:
            return position
    return len(text)


def demangled(names: Iterable[str]) -> list[str]:
    """Return C++ names as people write them, by the C++ library that torch needs anyway."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    found, status = [], ctypes.c_int()
    for name in names:
        text = demangle(name.encode(), None, None, ctypes.byref(status))
        found.append(ctypes.string_at(text).decode() if text else name)
        if text:
            free(text)
    return found


@functools.cache
def torch_index() -> Index:
    """Return the kernels that the installed torch holds for sm_60, in about three seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is not installed; run ./dev sync"
    library = Path(str(spec.origin)).parent / "lib/libtorch_cuda.so"
    return Index(demangled(kernel_names(library, [PASCAL])[PASCAL]))


@functools.cache
def own_kernels() -> frozenset[str]:
    """Return the names of our kernels."""
    _, _, table = _KERNELS_PAGE.read_text().partition("<!-- kernels: begin -->")
    return frozenset(re.findall(r"^\| (\w+) \| \d+ \| \d+ \|", table, re.MULTILINE))


def bitsandbytes_names() -> frozenset[str] | None:
    """Return what bitsandbytes' library for CUDA 12.6 holds for sm_60, without parameters; None if not installed."""
    library = bitsandbytes_library("12.6")
    if library is None:
        return None
    return frozenset(parts(plain(name))[0] for name in demangled(kernel_names(library, [PASCAL])[PASCAL]))
