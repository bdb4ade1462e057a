"""Builds the kernels: NVRTC 11.8 compiles CUDA C++ to PTX, ptxas 11.8 assembles PTX to a cubin.

This needs no nvcc, header, GPU or CUDA installation, only the wheels of the extra `kernels`, or the files named by
CUDA_NVRTC and CUDA_PTXAS, or CUDA_HOME. A file's name is the hash of its sources and options, so a changed source is
never served from a cache. Search order: the folder in SGLANG_PASCAL_KERNELS, the package's own `prebuilt` folder, the
user's cache; if none has it, it is built. For packages: `python -m sglang_pascal.kernels.build --output FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sglang_pascal.errors import PluginError, StorageError
from sglang_pascal.kernels.formats import ACTIVATION_BITS, FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SOURCES: Final = Path(__file__).parent
PREBUILT: Final = SOURCES / "prebuilt"
PREBUILT_VARIABLE: Final = "SGLANG_PASCAL_KERNELS"
NVRTC_VARIABLE: Final = "CUDA_NVRTC"
"""Path of libnvrtc.so; searched first."""
PTXAS_VARIABLE: Final = "CUDA_PTXAS"
"""Path of ptxas; searched first."""
TOOLCHAIN: Final = (11, 8)
"""The last CUDA release whose compilers are meant for Pascal."""
ARCHITECTURES: Final = ("60", "61")
"""Pascal's data-centre P100 (60), and all other Pascal cards (61). The digits of `compute_61` and `sm_61`."""
KV_TYPES: Final = ("F16", "E5M2", "INT8")
HEAD_DIMS: Final = (64, 128, 256)
_OPTIONS: Final = ("--std=c++17",)


class ToolchainError(PluginError):
    """NVRTC or ptxas is missing, has another version, or refuses a source."""

    exit_code = 8


@dataclass(frozen=True)
class Module:
    """One compilation of one source file."""

    source: str
    """File name without `.cu`."""
    defines: tuple[str, ...] = ()
    """`NAME=VALUE` of each macro."""

    @property
    def name(self) -> str:
        """Name as in file names: `decode_matmul.Q4_K.16`."""
        return ".".join([self.source, *(define.partition("=")[2] for define in self.defines)])

    def key(self, architecture: str) -> str:
        """Return a hash of everything that decides the result."""
        digest = hashlib.sha256(repr((self.defines, architecture, _OPTIONS, TOOLCHAIN)).encode())
        for text in (source_text(f"{self.source}.cu"), *headers().values()):
            digest.update(text)
        return digest.hexdigest()[:16]

    def file_name(self, architecture: str, kind: str) -> str:
        """Return the file's name. `kind` is ptx or cubin."""
        target = "compute" if kind == "ptx" else "sm"
        return f"{self.name}-{self.key(architecture)}.{target}_{architecture}.{kind}"


def _all_modules() -> Iterator[Module]:
    yield from (Module("repack", (f"TYPE={name}",)) for name in FORMATS)
    for source in ("decode_matmul", "tile_matmul"):
        for name in FORMATS:
            yield from (Module(source, (f"TYPE={name}", f"BITS={bits}")) for bits in ACTIVATION_BITS)
    for source in ("attention_decode", "attention_prefill"):
        for kv in KV_TYPES:
            yield from (Module(source, (f"KV={kv}", f"HEAD_DIM={head_dim}")) for head_dim in HEAD_DIMS)
    plain = ("attention_combine", "half_matmul", "kv_cache", "probe", "quantize", "sampling")
    yield from (Module(source) for source in plain)


MODULES: Final = {module.name: module for module in _all_modules()}
"""Every module of a complete build, by name."""


def artifact(module: Module, architecture: str, kind: str, keep_in: Path | None = None) -> bytes:
    """Return the PTX or cubin of a module: prebuilt, cached, or built now and kept in a folder (the user's cache)."""
    folder = keep_in or cache_folder()
    name = module.file_name(architecture, kind)
    for known in (folder, *_folders()):
        if (known / name).is_file():
            return (known / name).read_bytes()
    if kind == "ptx":
        source = f"{module.source}.cu"
        data = compile_ptx(source_text(source), source, architecture, module.defines)
    else:
        data = assemble(artifact(module, architecture, "ptx", keep_in), architecture)[0]
    store(folder / name, data)
    return data


def missing(architecture: str, kind: str) -> list[str]:
    """Return the names of the modules that would have to be built before their first use."""
    return [
        name
        for name, module in MODULES.items()
        if not any((known / module.file_name(architecture, kind)).is_file() for known in _folders())
    ]


def check_toolchain() -> None:
    """Raise ToolchainError if a module could not be built."""
    _nvrtc()
    find_ptxas()


def prebuild(folder: Path, on_file: Callable[[Path], None] | None = None) -> int:
    """Write every module for every architecture, as PTX and as cubin, to a folder; return the number of files."""
    jobs = [(module, arch, kind) for module in MODULES.values() for arch in ARCHITECTURES for kind in ("ptx", "cubin")]
    for module, architecture, kind in jobs:
        path = folder / module.file_name(architecture, kind)
        store(path, artifact(module, architecture, kind, keep_in=folder))
        if on_file:
            on_file(path)
    return len(jobs)


def store(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).chmod(0o644)  # every user must be able to read a package's files
        Path(file.name).replace(path)
    except OSError as exc:
        raise StorageError(
            f"cannot write the kernel {path}: {exc.strerror}; "
            "free space there or set XDG_CACHE_HOME to a writable folder"
        ) from exc


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/sglang-pascal/kernels`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sglang-pascal" / "kernels"


def _folders() -> list[Path]:
    named = os.environ.get(PREBUILT_VARIABLE)
    return [*([Path(named)] if named else []), PREBUILT, cache_folder()]


@functools.cache
def source_text(name: str) -> bytes:
    """Return a source file of this folder."""
    return (SOURCES / name).read_bytes()


@functools.cache
def headers() -> dict[str, bytes]:
    """Return name -> text of every header."""
    return {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}


def compile_ptx(source: bytes, name: str, architecture: str, defines: tuple[str, ...] = ()) -> bytes:
    """Compile CUDA C++ to PTX. Refuses warnings, and a result that would need linking."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    texts = headers()
    includes = (ctypes.c_char_p * len(texts))(*texts.values())
    include_names = (ctypes.c_char_p * len(texts))(*(header.encode() for header in texts))
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), len(texts), includes, include_names),
        name,
    )
    try:
        options = [f"--gpu-architecture=compute_{architecture}", *_OPTIONS, *(f"-D{define}" for define in defines)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        with _locale_kept():
            failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        log = _text(nvrtc, program, "nvrtcGetProgramLog").decode(errors="replace").strip()
        if failed or log:
            raise ToolchainError(f"NVRTC does not accept {name} with {' '.join(options)}:\n{log}")
        ptx = _text(nvrtc, program, "nvrtcGetPTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    refuse_unresolved(ptx, name)
    return ptx


@contextlib.contextmanager
def _locale_kept() -> Iterator[None]:
    """NVRTC 11.8 leaves its thread in the locale "C", in which Python reads every text file as ASCII."""
    uselocale = ctypes.CDLL(None).uselocale
    uselocale.argtypes, uselocale.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = uselocale(None)
    try:
        yield
    finally:
        uselocale(before)


def refuse_unresolved(ptx: bytes, name: str) -> None:
    """Refuse a symbol that another module would have to define: an intrinsic that NVRTC does not know loads nowhere."""
    if found := re.search(rb"\.extern\s+\.func\s+(?:\([^)]*\)\s*)?(\S+)", ptx):
        raise ToolchainError(
            f"the PTX of {name} needs the function {found[1].decode()}, which no module defines; "
            "write the instruction as inline PTX"
        )


def assemble(ptx: bytes, architecture: str) -> tuple[bytes, str]:
    """Assemble PTX to a cubin; return it and ptxas's report of each kernel's resources."""
    ptxas = find_ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_bytes(ptx)
        run = subprocess.run(
            [ptxas, "-v", f"-arch=sm_{architecture}", source, "-o", result], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise ToolchainError(f"{ptxas} failed with exit code {run.returncode}: {run.stderr.strip()}")
        return result.read_bytes(), run.stdout + run.stderr


def candidates(package: str, below: str) -> Iterator[Path]:
    """Yield the places where a wheel, or CUDA_HOME, would have a file."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or [] if spec else []:
        yield Path(root, package, below)
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, below)


def _named(variable: str) -> list[Path]:
    value = os.environ.get(variable)
    return [Path(value)] if value else []


def find_ptxas() -> Path:
    """Return the path of ptxas 11.8."""
    on_path = shutil.which("ptxas")
    for path in (
        *_named(PTXAS_VARIABLE),
        *candidates("cuda_nvcc", "bin/ptxas"),
        *([Path(on_path)] if on_path else []),
    ):
        if path.is_file() and _release_of(path) == TOOLCHAIN:
            return path
    raise ToolchainError(_missing("ptxas", "nvidia-cuda-nvcc-cu11", PTXAS_VARIABLE))


@functools.cache
def _release_of(program: Path) -> tuple[int, int] | None:
    run = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return (int(found[1]), int(found[2])) if found else None


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    for path in (
        *_named(NVRTC_VARIABLE),
        *candidates("cuda_nvrtc", "lib/libnvrtc.so.11.2"),
        *candidates("cuda_nvrtc", "lib64/libnvrtc.so.11.2"),
    ):
        if not path.is_file():
            continue
        # NVRTC opens its builtins by name, so load them first, by path.
        for builtins in path.parent.glob("libnvrtc-builtins.so.11.8*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if (major.value, minor.value) == TOOLCHAIN:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    raise ToolchainError(_missing("NVRTC", "nvidia-cuda-nvrtc-cu11", NVRTC_VARIABLE))


def _missing(tool: str, wheel: str, variable: str) -> str:
    version = ".".join(map(str, TOOLCHAIN))
    return (
        f"{tool} {version} is not on this machine, and no prebuilt kernel matches the sources; "
        f"install {wheel}=={version}.89, name the file by {variable}, set CUDA_HOME to CUDA {version}, "
        f"or set {PREBUILT_VARIABLE} to a prebuilt folder"
    )


def _check(nvrtc: ctypes.CDLL, code: int, name: str) -> None:
    if code:
        raise ToolchainError(f"NVRTC failed on {name}: {nvrtc.nvrtcGetErrorString(code).decode()}")


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, getter: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"{getter}Size")(program, ctypes.byref(size)), getter)
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, getter)(program, buffer), getter)
    return buffer.value


def _log(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Build all kernels into a folder, for a package."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_pascal.kernels.build", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, required=True, help="folder for the PTX and cubin files"
    )
    folder: Path = parser.parse_args(argv).output
    try:
        count = prebuild(folder, on_file=lambda path: _log(path.name))
    except PluginError as exc:
        _log(f"sglang-pascal: error: {exc}")
        return exc.exit_code
    _log(f"{count} files in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
