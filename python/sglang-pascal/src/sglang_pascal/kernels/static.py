"""Static analysis of each kernel as compiled for Pascal: registers, shared memory, spills, instructions of its loops.

This needs no GPU: ptxas 11.8 assembles for sm_61 (or sm_60), and nvdisasm prints the machine code. It shows whether
instructions or memory bound a kernel on Pascal, which a newer card cannot show. It says nothing about latency, caches
or power. Two instructions that nvdisasm joins by braces are issued together and take one issue slot.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sglang_pascal.kernels.build import (
    MODULES,
    Module,
    ToolchainError,
    artifact,
    assemble,
    cache_folder,
    candidates,
    store,
)
from sglang_pascal.kernels.formats import STEP_COLUMNS, TILE_COLUMNS

NVDISASM_VARIABLE: Final = "CUDA_NVDISASM"
"""Path of nvdisasm; searched first."""
NVDISASM_RELEASES: Final = ((11, 0), (13, 0))
"""First release that knows sm_60 and sm_61, and first release that no longer does."""
REGISTERS_PER_SM: Final = 65536
WARPS_PER_SM: Final = 64
SHARED_BYTES_PER_SM: Final = {"60": 65536, "61": 98304}
"""CUDA C++ Programming Guide, technical specifications per compute capability."""
_REGISTER_UNIT: Final = 256
"""A warp gets its registers in multiples of this."""
_SHARED_UNIT: Final = 256
_HALF_OPCODES: Final = ("HADD2", "HMUL2", "HFMA2")
_DOUBLE_OPCODES: Final = ("DADD", "DMUL", "DFMA", "DMNMX", "DSETP")
SLOW_OPCODES: Final = {"60": _DOUBLE_OPCODES, "61": (*_HALF_OPCODES, *_DOUBLE_OPCODES)}
"""Arithmetic at 1/64 (half) and 1/32 (double) of the rate of float. sm_60 has fast halves, and converts by HADD2."""
UNROLLED_COLUMNS: Final = 4
"""Most int8 rows of x for which decode_matmul.cu unrolls the steps of a tile."""
LOCAL_OPCODES: Final = ("LDL", "STL")
"""Local memory: registers that did not fit, or an array with a variable index."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code: straight-line instructions that end in a branch to their start."""

    instructions: int
    dual_issued: int
    """Instructions that share their issue slot with the one before."""
    opcodes: dict[str, int]
    """Opcode without modifiers -> count."""

    @property
    def slots(self) -> int:
        """Issue slots that one warp needs for one pass."""
        return self.instructions - self.dual_issued


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one architecture."""

    module: str
    name: str
    architecture: str
    """`60` or `61`."""
    threads: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    """Stack bytes per thread; should be 0."""
    slow_opcodes: dict[str, int]
    """Counts of `SLOW_OPCODES` and `LOCAL_OPCODES` in the whole kernel; should be empty."""
    loops: tuple[Loop, ...]
    """Innermost loops, in the order of the code."""

    @property
    def warps_per_sm(self) -> int:
        """Resident warps that registers and shared memory allow."""
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        ctas = REGISTERS_PER_SM // (per_warp * warps)
        if self.shared_bytes:
            shared = -(-self.shared_bytes // _SHARED_UNIT) * _SHARED_UNIT
            ctas = min(ctas, SHARED_BYTES_PER_SM[self.architecture] // shared)
        return min(WARPS_PER_SM, ctas * warps)

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop with the most multiplications, in which the kernel spends its time; None without one."""
        busiest = max(self.loops, key=_multiplications, default=None)
        return busiest if busiest and _multiplications(busiest) else None

    @property
    def slots_per_weight(self) -> float | None:
        """Issue slots per weight of the products (all their columns together); None for other kernels.

        For a tile product, those of its inner loop, without unpacking and staging.
        """
        if not self.module.startswith(("decode_matmul", "tile_matmul")) or self.main_loop is None:
            return None
        return self.main_loop.slots / self._weights_per_pass

    @property
    def rows_per_lane(self) -> int:
        """Rows of the weight per lane of a decode product.

        One pass of its loop covers a tile of each row if the tile's steps are unrolled, otherwise one step.
        """
        return max(1, self._weights_per_pass // (TILE_COLUMNS if self.columns <= UNROLLED_COLUMNS else STEP_COLUMNS))

    @property
    def _weights_per_pass(self) -> int:
        """Return the weights per pass of the loop.

        They follow from its dot products (of 4 weights and a column of int8, or of 2 weights and a row of x), or from
        its products if it has none.
        """
        assert self.main_loop is not None
        if products := self.main_loop.opcodes.get("IDP", 0) * 4:
            return products // self.columns
        takes_pairs = self.module.startswith("tile_matmul")
        return self.main_loop.opcodes.get("XMAD", 0) // (self.outputs if takes_pairs else self.columns)

    @property
    def outputs(self) -> int:
        """Rows of x that a product multiplies at once: the number at the end of its name."""
        found = re.search(r"_n(\d+)$", self.name)
        return int(found[1]) if found else 1

    @property
    def bits(self) -> int:
        """Bits of x, from the kernel's name; 8 if the kernel has no choice."""
        found = re.search(r"_(\d+)bit", self.name)
        return int(found[1]) if found else 8

    @property
    def columns(self) -> int:
        """int8 rows of x: two for each output of 16 bits."""
        return self.outputs * self.bits // 8


def _multiplications(loop: Loop) -> int:
    """Return the number of products of numbers.

    XMAD counts only beside FFMA: with a product's scales it replaces dp4a (sm_60); alone it computes addresses.
    """
    weights = {"IDP": 4, "FFMA": 1} if loop.opcodes.get("IDP") else {"FFMA": 1, "XMAD": int("FFMA" in loop.opcodes)}
    return sum(weight * loop.opcodes.get(opcode, 0) for opcode, weight in weights.items())


def analyse(architecture: str, names: tuple[str, ...] = ()) -> list[KernelReport]:
    """Return reports for the modules whose name starts with one of `names` (all modules if empty).

    Reports are kept in the user's cache beside the kernels, by the hash of a kernel's sources and of this program.
    """
    modules = [module for module in MODULES.values() if not names or module.name.startswith(names)]
    find_nvdisasm()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [report for reports in pool.map(lambda m: _reports(m, architecture), modules) for report in reports]
    order = {module.name: i for i, module in enumerate(modules)}
    return sorted(found, key=lambda r: (order[r.module], r.columns))


def _reports(module: Module, architecture: str) -> list[KernelReport]:
    """Return a module's reports from the cache, or make them."""
    program = hashlib.sha256(Path(__file__).read_bytes() + repr(_release_of(find_nvdisasm())).encode()).hexdigest()[:16]
    kept = cache_folder() / f"{module.name}-{module.key(architecture)}.{program}.report.json"
    if kept.is_file():
        return [_report_of(each) for each in json.loads(kept.read_text())]
    reports = _analyse(module, architecture)
    store(kept, json.dumps([asdict(each) for each in reports]).encode())
    return reports


def _report_of(fields: dict[str, Any]) -> KernelReport:
    return KernelReport(**fields | {"loops": tuple(Loop(**loop) for loop in fields["loops"])})


def _analyse(module: Module, architecture: str) -> list[KernelReport]:
    ptx = artifact(module, architecture, "ptx")
    cubin, log = assemble(ptx, architecture)
    code = disassemble(cubin)
    reports = []
    for name, resources in parse_resources(log).items():
        threads = re.search(rf"\.entry {name}\(.*?\.maxntid (\d+)", ptx.decode(), re.DOTALL)
        assert threads, f"{name} has no __launch_bounds__"
        lines = code[name]
        counts = Counter(line.opcode for line in lines)
        slow = {opcode: counts[opcode] for opcode in (*SLOW_OPCODES[architecture], *LOCAL_OPCODES) if counts[opcode]}
        reports.append(
            KernelReport(
                module.name, name, architecture, int(threads[1]), *resources, slow, tuple(innermost_loops(lines))
            )
        )
    return reports


def parse_resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Return kernel -> registers, bytes of static shared memory, bytes of stack; from `ptxas -v`."""
    found: dict[str, tuple[int, int, int]] = {}
    name, stack = "", 0
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name, stack = entry[1], 0
        elif frame := re.search(r"(\d+) bytes stack frame", line):
            stack = int(frame[1])
        elif used := re.search(r"Used (\d+) registers(?:, (\d+) bytes smem)?", line):
            found[name] = (int(used[1]), int(used[2] or 0), stack)
    return found


@dataclass(frozen=True)
class Instruction:
    """One line of nvdisasm's output."""

    opcode: str
    """Opcode without modifiers."""
    target: str | None
    """Label that a branch jumps to."""
    is_dual: bool
    labels: tuple[str, ...] = ()
    """Labels of this instruction."""


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Return kernel -> its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([find_nvdisasm(), "-c", file.name], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ToolchainError(f"nvdisasm failed with exit code {run.returncode}: {run.stderr.strip()}")
    return parse_code(run.stdout)


def parse_code(text: str) -> dict[str, list[Instruction]]:
    """Return kernel -> instructions from nvdisasm's text.

    Two lines in braces are one issue: `{ FFMA ...; /* ... */` and `LDS ...; /* ... */ }`.
    """
    kernels: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.setdefault(section[1], [])
        elif label := re.match(r"(\.L_\w+):", line.strip()):
            labels.append(label[1])
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*)$", line):
            body = code[1].rstrip()
            statement = re.sub(r"[{}]", "", body).split(";")[0].strip()
            opcode = re.sub(r"^@!?U?P\w+\s+", "", statement).split()[0].split(".")[0]
            branch = re.search(r"`\((\.L_\w+)\)", statement)
            current.append(Instruction(opcode, branch[1] if branch else None, body.endswith("}"), tuple(labels)))
            labels = []
    return kernels


def innermost_loops(code: list[Instruction]) -> list[Loop]:
    """Return the loops that contain no other loop."""
    place = {label: i for i, line in enumerate(code) for label in line.labels}
    spans = []
    for end, line in enumerate(code):
        start = place.get(line.target or "")
        if line.opcode == "BRA" and start is not None and start < end:  # a loop of one line is the padding at the end
            spans.append((start, end))
    inner = [span for span in spans if not any(_contains(span, other) for other in spans)]
    return [_loop(code[start : end + 1]) for start, end in inner]


def _contains(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and span[0] <= other[0] and other[1] <= span[1]


def _loop(lines: list[Instruction]) -> Loop:
    return Loop(
        len(lines), sum(line.is_dual for line in lines), dict(Counter(line.opcode for line in lines).most_common())
    )


@functools.cache
def find_nvdisasm() -> Path:
    """Return a disassembler that supports Pascal."""
    named, on_path = os.environ.get(NVDISASM_VARIABLE), shutil.which("nvdisasm")
    places = [*([Path(named)] if named else []), *candidates("cuda_nvcc", "bin/nvdisasm")]
    for path in (*places, *([Path(on_path)] if on_path else []), *_of_triton()):
        if path.is_file() and NVDISASM_RELEASES[0] <= _release_of(path) < NVDISASM_RELEASES[1]:
            return path
    raise ToolchainError(
        "no nvdisasm of CUDA 11 or 12 is on this machine, but the table of machine code needs one; install Debian's "
        f"nvidia-cuda-toolkit (non-free) or the triton wheel, or name the program by {NVDISASM_VARIABLE}"
    )


def _of_triton() -> list[Path]:
    """Triton's wheel contains one."""
    import importlib.util

    spec = importlib.util.find_spec("triton")
    roots = (spec.submodule_search_locations or []) if spec else []
    return [Path(root, "backends/nvidia/bin/nvdisasm") for root in roots]


@functools.cache
def _release_of(program: Path) -> tuple[int, int]:
    run = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)
