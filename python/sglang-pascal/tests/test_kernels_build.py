"""Building the kernels: with real NVRTC and ptxas 11.8 if they are installed, and the messages if they are not."""

from __future__ import annotations

import json
import locale
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sglang_pascal.device import Device
from sglang_pascal.errors import StorageError
from sglang_pascal.info import describe_kernels
from sglang_pascal.kernels import build
from sglang_pascal.kernels.build import ARCHITECTURES, MODULES, Module, ToolchainError
from sglang_pascal.kernels.formats import FORMATS


def has_toolchain() -> bool:
    try:
        build.find_ptxas()
        build._nvrtc()
    except ToolchainError:
        return False
    return True


needs_toolchain = pytest.mark.skipif(
    not has_toolchain(), reason="needs NVRTC and ptxas 11.8: install the extra 'kernels'"
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sglang-pascal" / "kernels"


class TestNames:
    def test_a_file_is_named_by_module_hash_and_target(self):
        name = MODULES["decode_matmul.Q4_K.16"].file_name("61", "cubin")
        assert name == f"decode_matmul.Q4_K.16-{MODULES['decode_matmul.Q4_K.16'].key('61')}.sm_61.cubin"
        assert MODULES["sampling"].file_name("60", "ptx").endswith(".compute_60.ptx")

    def test_the_hash_covers_source_headers_defines_and_architecture(self, monkeypatch):
        module = MODULES["decode_matmul.Q4_K.16"]
        keys = {module.key("61"), module.key("60"), Module("decode_matmul", ("TYPE=Q4_K", "BITS=8")).key("61")}
        monkeypatch.setattr(build, "source_text", lambda name: b"another source")
        keys.add(module.key("61"))
        monkeypatch.setattr(build, "headers", lambda: {"common.cuh": b"another header"})
        keys.add(module.key("61"))
        assert len(keys) == 5

    def test_every_weight_type_has_its_modules(self):
        for name in FORMATS:
            products = {f"{kind}_matmul.{name}.{bits}" for kind in ("decode", "tile") for bits in (8, 16)}
            assert {f"repack.{name}", *products} <= set(MODULES)


class TestInfo:
    """What `sglang-pascal info` says of the kernels."""

    @pytest.fixture(autouse=True)
    def two_modules(self, own_cache, monkeypatch):
        modules = {name: MODULES[name] for name in ("quantize", "sampling")}
        monkeypatch.setattr(build, "MODULES", modules)
        monkeypatch.setattr(build, "PREBUILT", own_cache)
        monkeypatch.setattr(build, "check_toolchain", lambda: None)

    def test_a_pascal_card_runs_machine_code_and_a_newer_one_ptx(self, own_cache):
        own_cache.mkdir(parents=True)
        (own_cache / MODULES["quantize"].file_name("61", "cubin")).touch()
        said = [describe_kernels([Device(0, "card", capability)]) for capability in ((6, 1), (6, 0), (9, 0))]
        assert said == [
            "machine code for sm_61, 1 of 2 modules built; the rest when first used",
            "machine code for sm_60, 0 of 2 modules built; the rest when first used",
            "PTX for compute_61, 0 of 2 modules built; the rest when first used",
        ]

    def test_what_keeps_them_from_being_used_is_said(self, monkeypatch):
        def refuse():
            raise ToolchainError("NVRTC 11.8 is not on this machine")

        monkeypatch.setattr(build, "check_toolchain", refuse)
        assert describe_kernels([Device(0, "card", (6, 1))]) == "cannot be used: NVRTC 11.8 is not on this machine"
        assert describe_kernels([Device(0, "card", (5, 2))]).startswith(
            "cannot be used: compute capability 5.2 is older"
        )


@needs_toolchain
class TestCompiling:
    def test_the_thread_keeps_its_locale(self):
        before = locale.nl_langinfo(locale.CODESET)
        build.compile_ptx(b'extern "C" __global__ void nothing() {}', "nothing.cu", "61")
        assert locale.nl_langinfo(locale.CODESET) == before

    def test_ptx_is_for_pascal_and_machine_code_follows(self, own_cache):
        module = MODULES["quantize"]
        ptx = build.artifact(module, "61", "ptx")
        assert b".target sm_61" in ptx
        assert b".entry rms_norm_quantize" in ptx
        assert build.artifact(module, "61", "cubin")[:4] == b"\x7fELF"
        assert sorted(path.name for path in own_cache.iterdir()) == sorted(
            module.file_name("61", kind) for kind in ("ptx", "cubin")
        )

    def test_what_is_cached_is_not_built_again(self, own_cache, monkeypatch):
        first = build.artifact(MODULES["quantize"], "61", "ptx")
        monkeypatch.setattr(build, "compile_ptx", lambda *_: pytest.fail("was compiled again"))
        assert build.artifact(MODULES["quantize"], "61", "ptx") == first

    def test_a_named_folder_comes_before_the_cache(self, own_cache, tmp_path, monkeypatch):
        folder = tmp_path / "named"
        folder.mkdir()
        (folder / MODULES["quantize"].file_name("61", "ptx")).write_bytes(b"prebuilt")
        monkeypatch.setenv(build.PREBUILT_VARIABLE, str(folder))
        assert build.artifact(MODULES["quantize"], "61", "ptx") == b"prebuilt"

    def test_an_error_in_a_source_shows_the_compilers_own_words(self):
        with pytest.raises(ToolchainError) as caught:
            build.compile_ptx(b"__global__ void f() { int x = y; }", "broken.cu", "61")
        assert str(caught.value) == (
            "NVRTC does not accept broken.cu with --gpu-architecture=compute_61 --std=c++17:\n"
            'broken.cu(1): error: identifier "y" is undefined\n\n'
            '1 error detected in the compilation of "broken.cu".'
        )

    def test_a_warning_is_an_error(self):
        with pytest.raises(ToolchainError, match="was declared but never referenced"):
            build.compile_ptx(b'extern "C" __global__ void f() { int unused; }', "untidy.cu", "61")

    def test_an_intrinsic_that_nvrtc_does_not_know_is_refused(self):
        source = b'extern "C" __device__ int g(int); extern "C" __global__ void f(int* x) { *x = g(*x); }'
        with pytest.raises(ToolchainError) as caught:
            build.compile_ptx(source, "x.cu", "61")
        assert str(caught.value) == (
            "the PTX of x.cu needs the function g, which no module defines; write the instruction as inline PTX"
        )

    def test_ptx_that_ptxas_refuses_is_reported(self):
        with pytest.raises(ToolchainError, match=r"ptxas failed with exit code \d+: ptxas"):
            build.assemble(b"nonsense", "61")

    def test_a_package_is_built_by_one_command(self, tmp_path, monkeypatch):
        """Modules that the cache has come from there; a second run changes nothing."""
        monkeypatch.setattr(build, "MODULES", {name: MODULES[name] for name in ("quantize", "sampling")})
        assert build.main(["--output", str(tmp_path)]) == 0
        files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert len(files) == 2 * len(ARCHITECTURES) * 2
        assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_a_wheel_carries_the_kernels_that_were_built_into_the_sources(tmp_path):
    """They are in no repository: git ignores them, and the builder leaves out what git ignores."""
    package = Path(__file__).parents[1]
    for name in ("src", "pyproject.toml", "README.md"):
        source = package / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.copy(package.parents[1] / ".gitignore", tmp_path)
    prebuilt = tmp_path / "src" / "sglang_pascal" / "kernels" / "prebuilt"
    shutil.rmtree(prebuilt, ignore_errors=True)
    names = {MODULES["quantize"].file_name(arch, kind) for arch in ARCHITECTURES for kind in ("ptx", "cubin")}
    for name in names:
        build.store(prebuilt / name, b"code")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sglang_pascal/kernels/prebuilt/")}
    assert {Path(name).name for name in inside} == names


class TestNoToolchain:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, own_cache, monkeypatch):
        monkeypatch.setattr(build, "candidates", lambda *_: iter(()))
        monkeypatch.setattr(build, "PREBUILT", own_cache)
        monkeypatch.setenv("PATH", "/nonexistent")
        for variable in (build.NVRTC_VARIABLE, build.PTXAS_VARIABLE, build.PREBUILT_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        build._nvrtc.cache_clear()
        yield
        build._nvrtc.cache_clear()

    def test_each_missing_tool_is_named_with_every_remedy(self):
        with pytest.raises(ToolchainError) as caught:
            build.artifact(MODULES["quantize"], "61", "ptx")
        assert str(caught.value) == (
            "NVRTC 11.8 is not on this machine, and no prebuilt kernel matches the sources; "
            "install nvidia-cuda-nvrtc-cu11==11.8.89, name the file by CUDA_NVRTC, set CUDA_HOME to CUDA 11.8, "
            "or set SGLANG_PASCAL_KERNELS to a prebuilt folder"
        )
        with pytest.raises(
            ToolchainError, match=r"^ptxas 11\.8 is not on this machine.*nvidia-cuda-nvcc-cu11==11\.8\.89"
        ):
            build.find_ptxas()

    def test_the_command_ends_with_its_exit_code(self, tmp_path, capsys):
        assert build.main(["--output", str(tmp_path / "out")]) == 8
        assert capsys.readouterr().err.startswith("sglang-pascal: error: NVRTC 11.8 is not on this machine")


def test_a_ptxas_of_another_release_is_passed_over(tmp_path, monkeypatch):
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    other.chmod(0o755)
    monkeypatch.setattr(build, "candidates", lambda *_: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"^ptxas 11\.8 is not on this machine"):
        build.find_ptxas()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "kernel.ptx"
    with pytest.raises(StorageError) as caught:
        build.store(target, b"x")
    assert str(caught.value) == (
        f"cannot write the kernel {target}: File exists; free space there or set XDG_CACHE_HOME to a writable folder"
    )


def test_building_needs_neither_torch_nor_numpy():
    """A package is built with a bare Python."""
    code = "import sys, json; import sglang_pascal.kernels.build; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "gguf", "sglang"} & set(json.loads(run.stdout))
