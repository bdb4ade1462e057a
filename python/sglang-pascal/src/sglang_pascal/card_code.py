"""Whether the installed libraries hold GPU code for a card, and what will run on it: part of `sglang-pascal info`.

The answer comes from the libraries themselves (`machine_code`), not from version numbers: torch 2.7.1 of the package
index holds code for 6.0, which 6.1 runs; 2.8 and later do not.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_pascal.errors import UnsupportedVersionError
from sglang_pascal.machine_code import architectures, parse_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sglang_pascal.machine_code import Code

WORKING_TORCH: Final = "torch==2.7.1"
"""The newest torch of the package index with code for Pascal (sm_60)."""
LOADED: Final = {"torch": "libtorch_cuda.so", "cuBLAS": "libcublas.so", "cuBLASLt": "libcublasLt.so"}
"""Library -> start of its file's name. A program that has imported torch has loaded all three."""
_MAPS: Final = Path("/proc/self/maps")


@dataclass(frozen=True)
class LibraryCode:
    """What one library means for one card."""

    name: str
    path: str
    architectures: tuple[str, ...]
    """Such as sm_60 and compute_90, with the number of entries: `sm_60 x378`."""
    runs: str
    """Machine code that the card runs, such as sm_60. Empty if the library has none."""
    compiles: str
    """PTX that the driver would compile. Empty if machine code runs or the library has no PTX for the card."""

    def describe(self) -> str:
        """Return the sentence of `sglang-pascal info`."""
        if self.runs:
            return f"{self.name}: has machine code for this card ({self.runs})"
        if self.compiles:
            return f"{self.name}: the driver compiles its {self.compiles} at the first start"
        remedy = f"; pip install '{WORKING_TORCH}'" if self.name in LOADED else ""
        held = ", ".join(self.architectures) or "code for the CPU"
        return f"{self.name}: has no code for this card, only {held}{remedy}"


def loaded_libraries(maps: str | None = None) -> dict[str, Path]:
    """Return name -> file of each library of LOADED that this process has loaded. maps: text of /proc/self/maps."""
    lines = (_MAPS.read_text(encoding="utf-8", errors="replace") if maps is None else maps).splitlines()
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {
        name: Path(path)
        for name, start in LOADED.items()
        for path in sorted(paths)
        if Path(path).name.startswith(start)
    }


def bitsandbytes_library(torch_cuda: str | None) -> Path | None:
    """Return the library that bitsandbytes loads beside a torch of this CUDA version; None if it is not installed."""
    package = importlib.util.find_spec("bitsandbytes")
    if package is None or package.origin is None or torch_cuda is None:
        return None
    return Path(package.origin).parent / f"libbitsandbytes_cuda{''.join(torch_cuda.split('.')[:2])}.so"


def installed_libraries() -> dict[str, Path]:
    """Return name -> file of each library whose GPU code a server may launch. Imports torch."""
    import torch

    extra = bitsandbytes_library(torch.version.cuda)
    return loaded_libraries() | ({"bitsandbytes": extra} if extra is not None else {})


def installed_code() -> dict[str, list[str]]:
    """Return name -> architectures of each of them, for `pascaline doctor`."""
    return {name: [str(code) for code in _sorted(architectures(path))] for name, path in installed_libraries().items()}


def judge(name: str, path: Path, capability: tuple[int, int]) -> LibraryCode:
    """Return what a library means for a card. Raises MachineCodeError if it cannot be read."""
    counts = architectures(path)
    machine_code, ptx = (best(counts, kind, capability) for kind in ("sm", "compute"))
    return LibraryCode(
        name=name,
        path=str(path),
        architectures=tuple(f"{code} x{counts[code]}" for code in _sorted(counts)),
        runs=str(machine_code or ""),
        compiles="" if machine_code else str(ptx or ""),
    )


def best(codes: Iterable[Code], kind: str, capability: tuple[int, int]) -> Code | None:
    """Return the newest code of a kind that a card of this compute capability can use, or None."""
    usable = [code for code in codes if code.kind == kind and code.runs_on(capability)]
    return max(usable, key=lambda code: code.number, default=None)


def _sorted(codes: Iterable[Code]) -> list[Code]:
    return sorted(codes, key=lambda code: (code.kind != "sm", code.number, code.is_specific))


def check_torch(version: str, built_for: Sequence[str], capabilities: Iterable[tuple[int, int]]) -> None:
    """Raise UnsupportedVersionError if torch has no code for one of the cards; its first operation would fail.

    built_for: `torch.cuda.get_arch_list()`, such as sm_60 and compute_90.
    """
    codes = [code for name in built_for if (code := parse_code(name)) is not None]
    for capability in capabilities:
        if not any(code.runs_on(capability) for code in codes):
            major, minor = capability
            raise UnsupportedVersionError(
                f"torch {version} has no code for compute capability {major}.{minor}, only for "
                f"{', '.join(built_for) or 'the CPU'}: pip install '{WORKING_TORCH}'"
            )


def what_runs(capability: tuple[int, int]) -> dict[str, str]:
    """Return which attention, products and widths this plugin runs on a card.

    Raises KernelError if the card is older than Pascal, PluginError if a variable of the widths is wrong.
    """
    from sglang_pascal.kernels.build import HEAD_DIMS, KV_TYPES
    from sglang_pascal.kernels.driver import target_of
    from sglang_pascal.names import DECODE_BITS_VARIABLE, PREFILL_BITS_VARIABLE
    from sglang_pascal.ops.matmul import DECODE_WIDTHS, TILE_WIDTHS
    from sglang_pascal.quantization.precision import activation_bits

    has_dp4a = target_of(capability)[0] != "60"
    decode, prefill = activation_bits(DECODE_BITS_VARIABLE), activation_bits(PREFILL_BITS_VARIABLE)
    return {
        "attention": f"pascal_kernels: heads of {', '.join(map(str, HEAD_DIMS))}, KV in {', '.join(KV_TYPES)}",
        "products": "dp4a, four int8 products an instruction"
        if has_dp4a
        else "integer products one by one: the card has no dp4a",
        "widths": f"decode steps {decode} bits, one pass over the weights for up to {max(DECODE_WIDTHS[decode])} rows; "
        f"prompts {prefill} bits, in tiles of {min(TILE_WIDTHS[prefill])} to {max(TILE_WIDTHS[prefill])} rows",
    }


def compiled_at_start(capability: tuple[int, int], libraries: Iterable[LibraryCode]) -> list[str]:
    """Return what a first start on a card would compile; empty if everything is there as machine code."""
    from sglang_pascal.kernels.build import MODULES, missing
    from sglang_pascal.kernels.driver import target_of

    architecture, kind = target_of(capability)
    left = missing(architecture, kind)
    found = [f"{len(left)} of {len(MODULES)} modules of the plugin's kernels, once"] if left else []
    if kind == "ptx":
        found.append(f"the kernels' PTX for compute_{architecture}, in the driver")
    return found + [f"{each.name}'s {each.compiles}, in the driver" for each in libraries if each.compiles]


def _not_installed(found: Iterable[str]) -> list[str]:
    """Return a sentence that says bitsandbytes is not installed. The lock does not have it, and only NF4 needs it."""
    return [] if "bitsandbytes" in found else ["bitsandbytes: is not installed; weights in NF4 need it"]


def describe_card(capability: tuple[int, int]) -> dict[str, Any]:
    """Return everything that `info` says of one card."""
    libraries = [judge(name, path, capability) for name, path in installed_libraries().items()]
    return {
        "compute_capability": ".".join(map(str, capability)),
        "libraries": [asdict(each) for each in libraries],
        "code": [each.describe() for each in libraries] + _not_installed(each.name for each in libraries),
        "compiled_at_start": compiled_at_start(capability, libraries),
        **what_runs(capability),
    }
