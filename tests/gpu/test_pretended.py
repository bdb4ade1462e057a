"""The switch that shows tests another card: what each door says, what is refused and of whom, and where it is refused."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.gpu.fake_nvml import _compiler, build_fake_nvml, write_scenario
from pascaline.inherited import is_inherited
from support import pretended
from support.pretended import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

RUNTIME = """
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
int cudaDeviceGetAttribute(int *v, int which, int device) {
    (void)device;
    *v = which == 75 ? 9 : which == 16 ? 132 : which == 38 ? 52428800 : which == 97 ? 232448 : which == 81 ? 233472 : 0;
    return 0;
}
static int fill(char *p, int at) {
    memset(p, 0, 1024);
    strcpy(p, "NVIDIA H200");
    *(size_t *)(p + 288) = 150000000000, *(int *)(p + 360) = 9, *(int *)(p + at) = 132, *(int *)(p + 600) = 52428800;
    return 0;
}
int cudaGetDeviceProperties(char *p, int device) { return (void)device, fill(p, 384); }
int cudaGetDeviceProperties_v2(char *p, int device) { return (void)device, fill(p, 388); }
int cudaMemGetInfo(size_t *free, size_t *total) { return *free = 149000000000, *total = 150000000000, 0; }
int cudaMalloc(void **p, size_t bytes) { return *p = malloc(bytes >> 20), 0; }
int cudaFree(void *p) { return free(p), 0; }
int cuDeviceGetAttribute(int *v, int which, int device) { return cudaDeviceGetAttribute(v, which, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return (void)device, *bytes = 150000000000, 0; }
int cublasSetMathMode(void *h, int mode) { return (void)h, (void)mode, 0; }
int cublasLtMatmulDescCreate(void *d, int compute, int scale) { return (void)d, (void)compute, (void)scale, 0; }
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int at, int lda,
    const void *b, int bt, int ldb, const void *beta, void *c, int ct, int ldc, int compute, int algo) {
    (void)h, (void)ta, (void)tb, (void)m, (void)n, (void)alpha, (void)a, (void)at, (void)lda, (void)b, (void)bt;
    (void)ldb, (void)beta, (void)c, (void)ct, (void)ldc, (void)compute;
    return k == 3 && algo == 99 ? 0 : 1;
}
"""
"""Stands for libcudart, libcuda and cuBLAS of an H200; properties have CUDA 13's layout, or with _v2 CUDA 12's."""
USER = """
#include <stddef.h>
int cudaGetDeviceProperties(char *, int), cudaGetDeviceProperties_v2(char *, int);
int cudaMemGetInfo(size_t *, size_t *), cudaMalloc(void **, size_t), cudaFree(void *);
int cublasSetMathMode(void *, int), cublasLtMatmulDescCreate(void *, int, int);
int cublasGemmEx(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int,
    const void *, void *, int, int, int, int);
int get(char *p, int is_12) { return is_12 ? cudaGetDeviceProperties_v2(p, 0) : cudaGetDeviceProperties(p, 0); }
int room(size_t *free, size_t *total) { return cudaMemGetInfo(free, total); }
int take(void **p, size_t bytes) { return cudaMalloc(p, bytes); }
int give(void *p) { return cudaFree(p); }
int math(int mode) { return cublasSetMathMode(0, mode); }
int describe(int compute, int type) { return cublasLtMatmulDescCreate(0, compute, type); }
int product(int type, int compute) {
    return cublasGemmEx(0, 0, 0, 1, 2, 3, 0, 0, type, 1, 0, type, 1, 0, 0, type, 1, compute, 99);
}
"""
"""Stands for torch: it links those libraries, so its calls pass the switch."""
ASK = """
import ctypes, json, struct, sys
user, driver = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
found = {}
for is_12, at in ((0, 384), (1, 388)):
    p = ctypes.create_string_buffer(1024)
    assert user.get(p, is_12) == 0
    number = lambda place, form="i": struct.unpack_from(form, p.raw, place)[0]
    found[f"properties {12 if is_12 else 13}"] = [
        p.value.decode(), number(288, "N"), number(360), number(364), number(at), number(600)
    ]
value, size, total, block = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
found["driver"] = [(driver.cuDeviceGetAttribute(ctypes.byref(value), n, 0), value.value)[1] for n in (75, 76, 16)]
driver.cuDeviceTotalMem_v2(ctypes.byref(size), 0)
found["driver"].append(size.value)
def room():
    user.room(ctypes.byref(size), ctypes.byref(total))
    return [size.value, total.value]
found["room"] = [room()]
G = 2**30
found["taken"] = [user.take(ctypes.byref(block), ctypes.c_size_t(n * G)) for n in (6, 2)]
found["room"].append(room())
user.give(block)
found["room"].append(room())
def multiply(*arguments): return user.product(*arguments)
found["products"] = {name: multiply(*types) for name, types in {
    "half": (2, 68), "float": (0, 68), "bfloat16": (14, 68), "fp8": (28, 68), "TF32": (0, 77)}.items()}
found["descriptors"] = [user.describe(68, 0), user.describe(77, 0), user.describe(68, 14)]
found["math"] = [user.math(0), user.math(3)]
print(json.dumps(found))
"""
PYTHON = """
import json, os, torch, triton
from sglang_pascal.kernels import driver
def tried(call, *arguments):
    try: return call(*arguments)
    except RuntimeError as error: return str(error)
@triton.jit
def add(x): pass
def double(x): return 2 * x
def launches(): add[(1,)](1)
def compiles(): return torch.compile(double)(2)
found = {"triton": tried(launches), "compile": tried(compiles)}
os.environ["TORCHDYNAMO_DISABLE"] = "1"
found["off"] = tried(compiles)
found["target"] = driver.target_of((int(os.environ["STAND_IN_CARD_MAJOR"]),
                                    int(os.environ["STAND_IN_CARD_MINOR"])))
found["built for"] = torch._C._cuda_getArchFlags().split()[-1]
print(json.dumps(found))
"""
CARDS = {"tesla-p4": ("Tesla P4", 7980711936, 6, 1, 20, 2 * 2**20), "tesla-p100-16gb": ("Tesla P100-PCIE-16GB", 17070817280, 6, 0, 56, 4 * 2**20)}  # fmt: skip


def python(program: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return pretended.build(tmp_path_factory.mktemp("pretended"))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> tuple[str, str]:
    """The stand-ins: what links CUDA, and CUDA."""
    folder = tmp_path_factory.mktemp("stand-ins")
    (folder / "cuda.c").write_text(RUNTIME)
    (folder / "user.c").write_text(USER)
    flags = ["-shared", "-fPIC", f"-Wl,-rpath,{folder}", f"-L{folder}"]
    for name, links in (("cuda", []), ("user", ["-lcuda-stand-in"])):
        target = folder / ("libcuda-stand-in.so" if name == "cuda" else "libuser.so")
        subprocess.run([*_compiler(), *flags, "-o", str(target), str(folder / f"{name}.c"), *links], check=True)
    return str(folder / "libuser.so"), str(folder / "libcuda-stand-in.so")


@pytest.fixture
def environment(library: Path) -> Callable[..., dict[str, str]]:
    """environment(card, report=None) -> variables of a process that sees it."""
    return lambda card, **more: pretended.environment(card, library=library, **more)


@pytest.mark.parametrize("card", CARDS)
def test_every_door_of_cuda_says_the_same(card, environment, libraries, tmp_path):
    name, total, major, minor, multiprocessors, l2 = CARDS[card]
    report = tmp_path / "report"
    done = python(ASK, environment(card, report=report), *libraries)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["properties 12"] == found["properties 13"] == [name, total, major, minor, multiprocessors, l2]
    assert found["driver"] == [major, minor, multiprocessors, total]
    room, g = total - pretended.CONTEXT_BYTES, 2**30
    fits = total > 8 * g + pretended.CONTEXT_BYTES
    assert found["taken"] == [0, 0 if fits else 2]
    # Where both fit, the second block is the one that is given back.
    held = [0, 8 * g, 6 * g] if fits else [0, 6 * g, 0]
    assert found["room"] == [[room - n, total] for n in held]
    assert found["products"] == {"half": 0, "float": 0, "bfloat16": 15, "fp8": 15, "TF32": 15}
    assert (found["descriptors"], found["math"]) == ([0, 15, 15], [0, 15])
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["what"] for line in lines] == [
        "a bfloat16 product by cublasGemmEx (data type 14, compute type 68)",
        "a product of 8-bit floating point by cublasGemmEx (data type 28, compute type 68)",
        "a tensor-core product by cublasGemmEx (data type 0, compute type 77)",
        "a tensor-core product by cublasLtMatmul (data type 0, compute type 77)",
        "a bfloat16 product by cublasLtMatmul (data type 14, compute type 68)",
        "TF32 products by cublasSetMathMode",
    ]
    assert lines[0]["callers"][0].endswith(" multiply")
    assert f"pretended card: {name} cannot run a bfloat16 product by cublasGemmEx" in done.stderr


def test_nvml_says_the_same(environment, tmp_path):
    scenario = tmp_path / "h200.nvml"
    write_scenario(
        scenario,
        "[gpu 0]\nnvmlDeviceGetUUID = GPU-a\nnvmlDeviceGetName = NVIDIA H200\n"
        "nvmlDeviceGetCudaComputeCapability = 9 0\nnvmlDeviceGetTemperature 0 = 50\n"
        "nvmlDeviceGetMemoryInfo = 150000000000 149000000000 1000000000\n"
        "nvmlDeviceGetMemoryInfo_v2 = 150000000000 500000000 148500000000 1000000000\n",
    )
    program = (
        "import pynvml as n\nn.nvmlInit()\ng = n.nvmlDeviceGetHandleByIndex(0)\n"
        "m = n.nvmlDeviceGetMemoryInfo(g)\nv = n.nvmlDeviceGetMemoryInfo(g, version=n.nvmlMemory_v2)\n"
        "print([n.nvmlDeviceGetName(g), n.nvmlDeviceGetCudaComputeCapability(g), n.nvmlDeviceGetTemperature(g, 0),"
        " m.total, m.used, m.free, v.total, v.reserved, v.used, v.free])"
    )
    seen = environment("tesla-p4")
    seen["LD_LIBRARY_PATH"] = str(build_fake_nvml(tmp_path))
    done = python(program, seen | {"PASCALINE_FAKE_NVML": str(scenario)})
    assert done.returncode == 0, done.stderr
    total, used = 7980711936, 10**9
    memory = [total, used, total - used]
    assert ast.literal_eval(done.stdout) == ["Tesla P4", (6, 1), 50, *memory, total, 0, *memory[1:]]


HOLD = """
import ctypes, os, subprocess, sys
user = ctypes.CDLL(sys.argv[1])
def take(n): return user.take(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(n * 2**30))
def ask(): return int(subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], capture_output=True, text=True).stdout)
found = [take(3), ask()]
if not os.fork():
    os._exit(take(3))
found += [os.waitstatus_to_exitcode(os.wait()[1]), take(3)]
import pynvml as n
n.nvmlInit()
g = n.nvmlDeviceGetHandleByIndex(0)
m, p = n.nvmlDeviceGetMemoryInfo(g), n.nvmlDeviceGetComputeRunningProcesses(g)
print(found + [m.total, m.used, [(each.pid == os.getpid(), each.usedGpuMemory) for each in p]])
"""
TAKE_5 = "import ctypes, sys\nprint(ctypes.CDLL(sys.argv[1]).take(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(5 * 2**30)))"


def test_the_processes_of_a_command_share_the_memory(environment, libraries, tmp_path):
    """5 GiB beside 3 are too much for 8 GB, 3 are not; and what a process held is free once it has ended."""
    (tmp_path / "ledger").touch()
    seen = environment("tesla-p4") | {pretended.LEDGER: str(tmp_path / "ledger")}
    scenario = tmp_path / "h200.nvml"
    write_scenario(
        scenario,
        "[gpu 0]\nnvmlDeviceGetUUID = GPU-a\nnvmlDeviceGetMemoryInfo = 150000000000 149000000000 90000000000\n"
        f"nvmlDeviceGetComputeRunningProcesses = {os.getpid()}:{5 * 2**30}\n",
    )
    seen |= {"LD_LIBRARY_PATH": str(build_fake_nvml(tmp_path)), "PASCALINE_FAKE_NVML": str(scenario)}
    done = python(HOLD, seen, libraries[0], TAKE_5)
    assert done.returncode == 0, done.stderr
    used = 6 * 2**30 + pretended.CONTEXT_BYTES
    assert ast.literal_eval(done.stdout) == [0, 2, 0, 0, 7980711936, used, []]


def test_a_command_gets_a_card_of_its_own(library, monkeypatch, tmp_path):
    """And so does each of its processes that asks for another one."""
    monkeypatch.setattr(pretended, "build", lambda: library)
    monkeypatch.setenv("PYTHONPATH", str(Path(pretended.__file__).parents[2]))
    program = (
        "import os, pathlib, sys\nfrom support import pretended\n"
        f"own = os.environ[pretended.LEDGER]\nother = pretended.another_card(pathlib.Path({str(tmp_path)!r}))\n"
        "sys.exit(own == other[pretended.LEDGER] or not os.path.exists(other[pretended.LEDGER]))"
    )
    assert pretended.run("tesla-p4", [sys.executable, "-c", program]) == 0
    assert pretended.another_card(tmp_path) == {}


def test_an_instance_hands_the_switch_on_to_its_engine(environment, tmp_path):
    """Both or neither: the variable alone is refused."""
    own = environment("tesla-p4", report=tmp_path / "report") | {pretended.LEDGER: str(tmp_path)}
    assert [name for name in own if os.environ.get(name) != own[name] and not is_inherited(name)] == []


def test_the_drivers_folder_names_the_card(environment, tmp_path):
    information = tmp_path / "gpus/0000:3b:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 70\n")
    version = "NVRM version: NVIDIA UNIX {}  580.159.04  Release Build\nGCC version:\n"
    (tmp_path / "version").write_text(version.format("Open Kernel Module for x86_64"))
    program = (
        "import sys, pathlib\nfrom pascaline.cards import detect_card\n"
        "print(detect_card(0, pathlib.Path(sys.argv[1])), *(pathlib.Path(name).read_text() for name in sys.argv[2:]))"
    )
    seen = environment("tesla-p100-16gb") | {"STAND_IN_CARD_PROC_GPUS": str(tmp_path / "gpus")}
    done = python(program, seen, str(tmp_path / "gpus"), str(information), str(tmp_path / "version"))
    closed = version.format("x86_64 Kernel Module")
    assert done.stdout == f"tesla-p100-16gb Model: \t\t Tesla P100-PCIE-16GB\nIRQ:   \t\t 70\n {closed}\n"


@pytest.mark.parametrize(("card", "target"), [("tesla-p4", "61"), ("tesla-p100-16gb", "60")])
def test_what_pascal_cannot_run_names_its_caller(card, target, environment, tmp_path):
    script = tmp_path / "asks.py"  # Triton reads the source of a kernel
    script.write_text(PYTHON)
    seen = environment(card) | {"TORCHDYNAMO_DISABLE": "0"}
    done = subprocess.run([sys.executable, str(script)], env=seen, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, name = json.loads(done.stdout), CARDS[card][0]
    assert found["triton"].startswith(f"{name} cannot run the Triton kernel add, called by ")
    assert "launches" in found["triton"]
    assert found["compile"].startswith(f"{name} cannot run double compiled by torch.compile, called by ")
    assert "compiles" in found["compile"]
    assert (found["off"], found["target"], found["built for"]) == (4, [target, "ptx"], f"sm_{target}")


class TestRefusal:
    def test_a_process_that_no_test_started(self, environment):
        seen = environment("tesla-p4") | {pretended.PARENT: str(os.getpid() + 10**7)}
        done = python("print('ran')", seen)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"{VARIABLE}=tesla-p4 is for this project's tests, under `python tests/support/pretended`: unset it\n"
        )

    def test_the_plugin_without_the_switch(self):
        done = python("import sglang_pascal; sglang_pascal.activate()", os.environ | {VARIABLE: "tesla-p4"})
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            f"sglang_pascal.errors.PluginError: {VARIABLE}=tesla-p4 is for this project's tests, "
            "under `python tests/support/pretended`: unset it"
        )

    def test_an_unknown_card_on_the_command_line(self, capsys):
        assert pretended.main(["tesla-v100", "--", "true"]) == 2
        assert capsys.readouterr().err == (
            "usage: pretended tesla-p4|tesla-p100-16gb [--report FILE.jsonl] -- COMMAND …\n"
        )
