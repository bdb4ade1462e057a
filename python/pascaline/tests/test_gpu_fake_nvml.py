"""The simulated NVML: nvidia-ml-py loads it unchanged, its scenarios do what its README says, its mistakes are reported."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pascaline.errors import MissingError, StorageError
from pascaline.gpu import fake_nvml
from pascaline.gpu.calls import ERROR_NAMES
from pascaline.gpu.fake_nvml import build_fake_nvml, fake_nvml_environment, write_scenario

GPU = "[gpu 0]\nnvmlDeviceGetUUID = GPU-a\n"


def ask(scenario: Path, expression: str) -> subprocess.CompletedProcess[str]:
    """Evaluate an expression of nvidia-ml-py about GPU 0 (`gpu`) in a process that has the library."""
    program = (
        "import pynvml as n\n"
        "def tried(call):\n"
        "    try: return call()\n"
        "    except n.NVMLError as error: return f'error {error.value}'\n"
        "n.nvmlInit()\ngpu = tried(lambda: n.nvmlDeviceGetHandleByIndex(0))\n"
        f"print(repr(tried(lambda: {expression})))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        env=fake_nvml_environment(scenario),
        capture_output=True,
        text=True,
        check=False,
    )


def answer(scenario: Path, expression: str) -> object:
    done = ask(scenario, expression)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


@pytest.mark.parametrize(
    ("lines", "expression", "wanted"),
    [
        ("nvmlDeviceGetName = Tesla P4", "n.nvmlDeviceGetName(gpu)", "Tesla P4"),
        ("nvmlDeviceGetMemoryBusWidth = 256", "n.nvmlDeviceGetMemoryBusWidth(gpu)", 256),
        ("nvmlDeviceGetPowerUsage = 0x10", "n.nvmlDeviceGetPowerUsage(gpu)", 16),
        ("nvmlDeviceGetClockInfo 2 = 3003", "n.nvmlDeviceGetClockInfo(gpu, 2)", 3003),
        ("nvmlDeviceGetClockInfo 2 = 3003", "n.nvmlDeviceGetClockInfo(gpu, 1)", "error 3"),
        ("nvmlDeviceGetPowerUsage = error GPU_IS_LOST", "n.nvmlDeviceGetPowerUsage(gpu)", "error 15"),
        ("nvmlDeviceGetPowerUsage = error 27", "n.nvmlDeviceGetPowerUsage(gpu)", "error 27"),
        ("nvmlDeviceGetPowerUsage = slow 0.01 7", "n.nvmlDeviceGetPowerUsage(gpu)", 7),
        ("nvmlDeviceGetPowerUsage = wave(5,5,1)", "n.nvmlDeviceGetPowerUsage(gpu)", 5),
        ("nvmlDeviceGetPowerUsage = count(5,0)", "n.nvmlDeviceGetPowerUsage(gpu)", 5),
        ("nvmlDeviceGetPowerUsage = 1\nnvmlDeviceGetPowerUsage = 2", "n.nvmlDeviceGetPowerUsage(gpu)", 2),
        ("nvmlDeviceGetPowerUsage = 1\n[gpu *]\nnvmlDeviceGetPowerUsage = 2", "n.nvmlDeviceGetPowerUsage(gpu)", 1),
        ("[gpu 0 at 3600]\nnvmlDeviceGetPowerUsage = 1", "n.nvmlDeviceGetPowerUsage(gpu)", "error 3"),
        ("[gpu 0 at 0]\nnvmlDeviceGetPowerUsage = 1", "n.nvmlDeviceGetPowerUsage(gpu)", 1),
        ("all = error GPU_IS_LOST", "gpu", "error 15"),
        ("nvmlDeviceGetEccMode = 1 0", "n.nvmlDeviceGetEccMode(gpu)", [1, 0]),
        ("nvmlDeviceGetEccMode = 1", "n.nvmlDeviceGetEccMode(gpu)", "error 999"),
        ("nvmlDeviceGetRetiredPages 0 =", "n.nvmlDeviceGetRetiredPages(gpu, 0)", []),
        ("nvmlDeviceGetRetiredPages 0 = 0x1000 8192", "n.nvmlDeviceGetRetiredPages(gpu, 0)", [4096, 8192]),
        (
            "nvmlDeviceGetComputeRunningProcesses = 7:100 8:-",
            "[(p.pid, p.usedGpuMemory) for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)]",
            [(7, 100), (8, None)],
        ),
        ("nvmlDeviceGetFieldValues 82 = 56", "n.nvmlDeviceGetFieldValues(gpu, [82])[0].value.ullVal", 56),
        ("nvmlDeviceGetFieldValues 82 = 56", "n.nvmlDeviceGetFieldValues(gpu, [83])[0].nvmlReturn", 3),
        ("[gpu 4]\nnvmlDeviceGetName = x", "n.nvmlDeviceGetCount()", 5),
        ("[library]\nnvmlDeviceGetCount = 9", "n.nvmlDeviceGetCount()", 9),
        ("", "n.nvmlDeviceGetHandleByIndex(1)", "error 2"),
        ("", "n.nvmlErrorString(15)", "GPU_IS_LOST"),
    ],
)
def test_a_line_decides_what_nvidia_ml_py_gets(tmp_path: Path, lines: str, expression: str, wanted: object) -> None:
    scenario = tmp_path / "s.nvml"
    write_scenario(scenario, GPU + lines + "\n")
    assert answer(scenario, expression) == wanted


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("nvmlDeviceGetPowerUsag = 1", "no such NVML call here"),
        ("nvmlDeviceGetPowerUsage 1", "expected NAME = VALUE"),
        ("[gpu]", 'a heading is [library], [gpu N] or [gpu *], with "at SECONDS" if it holds later'),
        ("[gpu 64]", "at most 64 GPUs"),
        ("[gpu *]\nxid = 79", "xid belongs below [gpu N]"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: str, wrong: str) -> None:
    scenario = tmp_path / "s.nvml"
    write_scenario(scenario, GPU + line + "\n")
    number = len((GPU + line).splitlines())
    assert f"fake NVML: {scenario}:{number}: {wrong}\n" in ask(scenario, "1").stderr


def test_error_names_are_nvmls() -> None:
    """The C table, ours and nvidia-ml-py's are one list."""
    import pynvml

    source = (Path(fake_nvml.__file__).parent / "fake_nvml.c").read_text()
    in_c = {int(code): name for name, code in re.findall(r'\{"([A-Z_]+)", (\d+)\}', source)}
    assert {code: in_c[code] for code in ERROR_NAMES} == ERROR_NAMES
    for code, name in in_c.items():
        assert getattr(pynvml, f"NVML_ERROR_{name}") == code


def test_a_symbol_that_is_left_out_is_not_in_the_library(tmp_path: Path) -> None:
    whole = ctypes.CDLL(str(build_fake_nvml(tmp_path) / fake_nvml.LIBRARY_NAME))
    old = ctypes.CDLL(str(build_fake_nvml(tmp_path, without=["nvmlDeviceGetName"]) / fake_nvml.LIBRARY_NAME))
    assert hasattr(whole, "nvmlDeviceGetName")
    assert not hasattr(old, "nvmlDeviceGetName")


def test_the_library_is_built_once(tmp_path: Path) -> None:
    first = build_fake_nvml(tmp_path) / fake_nvml.LIBRARY_NAME
    inode = first.stat().st_ino
    assert (build_fake_nvml(tmp_path) / fake_nvml.LIBRARY_NAME).stat().st_ino == inode


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no C compiler, as a bare Debian."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_the_package_ziglang_compiles_it_where_the_machine_has_no_compiler(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="the package ziglang is not installed")
    library = build_fake_nvml(tmp_path / "library") / fake_nvml.LIBRARY_NAME
    assert hasattr(ctypes.CDLL(str(library)), "nvmlDeviceGetName")
    assert [path.name for path in library.parent.iterdir()] == [fake_nvml.LIBRARY_NAME]


@pytest.mark.usefixtures("no_compiler")
def test_without_any_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        build_fake_nvml(tmp_path)
    assert str(caught.value) == (
        "no C compiler found as $CC, cc, gcc or clang, nor the package ziglang, and the fake NVML library needs one; "
        "install one (Debian: apt install gcc libc6-dev; anywhere: pip install ziglang)"
    )


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(
        StorageError, match=r"^failed to write the fake NVML library to .*: Not a directory; set XDG_CACHE_HOME"
    ):
        build_fake_nvml(occupied)


def test_the_environment_puts_the_library_first() -> None:
    environment = fake_nvml_environment(Path("/s"), Path("/lib"), {"LD_LIBRARY_PATH": "/other"})
    assert environment == {"LD_LIBRARY_PATH": "/lib:/other", "PASCALINE_FAKE_NVML": "/s"}


def test_the_readme_names_every_error_and_value_word() -> None:
    readme = (Path(fake_nvml.__file__).parent / "README.md").read_text()
    for word in ("hang", "crash", "slow 0.02 VALUE", "wave(40,70,60)", "count(5,2.5)", "error NAME", "xid = 79"):
        assert word in readme
