"""Profiles: recorded traces and databases read, summed up and held against a roofline; one real record of SGLang."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.cards import unknown_card
from pascaline.errors import EngineError
from pascaline.gpu.fake_nvml import fake_nvml_environment, write_scenario
from pascaline.planning import make_plan
from pascaline.profile.engine import serving, write_nvprof_wrapper
from pascaline.profile.nvprof import is_nvprof, read_nvprof, write_chrome_trace
from pascaline.profile.roofline import StepBytes, Summary, summarise, to_text
from pascaline.profile.session import Load, Target, record
from pascaline.profile.timeline import KV_CACHE, Kernel, Timeline, kind_of, read_by
from pascaline.profile.trace import TraceError, is_whole, read_trace
from support.instance import PATIENCE, wait_until
from support.planning import LLAMA_3_8B, request

RECORDS = Path(__file__).parent / "records"
CPU_TRACE = RECORDS / "sglang-0.5.23-cpu.trace.json.gz"
"""The beginning of one decode step of SmolLM2-135M in SGLang 0.5.23 on a CPU, torch 2.7.1."""
GPU_TRACE = RECORDS / "torch-cuda.trace.json.gz"
"""Three steps of two layers of half-precision products, torch 2.11 on an H200."""
SERVED_TRACE = RECORDS / "sglang-0.5.23-h100.trace.json.gz"
"""Three decode steps of one request to Llama 3.1 8B's shape in Q4_K_M, SGLang 0.5.23 on an H100; only what is read."""
# Its matrices by hand, (rows, columns): q and o, k, gate and up of 32 layers, v and down of the 16 that have them in
# Q4_K (144 bytes for 256 weights); v and down of the other 16, and the output, in Q6_K (210 bytes).
_HALF_OF_V_AND_DOWN = 16 * (1024 * 4096 + 4096 * 14336)
SERVED_MATRICES = {
    "Q4_K": (32 * (2 * 4096 * 4096 + 1024 * 4096 + 2 * 14336 * 4096) + _HALF_OF_V_AND_DOWN) // 256 * 144,
    "Q6_K": (_HALF_OF_V_AND_DOWN + 128256 * 4096) // 256 * 210,
}
SERVED_NORMS = 2 * 65 * 4096
"""Two norms of 32 layers and one behind them, float16."""
# Seconds of all three steps, added up from the events.
Q4_K_SECONDS, Q6_K_SECONDS, ATTENTION_SECONDS = 6523.542e-6, 2101.244e-6, 1102.134e-6
QUANTIZE_SECONDS = 4.448e-6
NORM_SECONDS = (4020.529 + 449.125 + 162.726 + 11.457) * 1e-6
"""rms_norm_quantize, rope_and_store, silu_mul_quantize and dequantize_Q4_K, which looks tokens up."""
SERVED_KV = 54 * 32 * 2 * 8 * 128 * 2
"""54 tokens, 32 layers, keys and values of 8 heads of 128, float16."""
CAPTURES = Path(__file__).parents[1] / "gpu" / "captures"
H100_BANDWIDTH = 2 * 2619e6 * 5120 / 8
FAKE_ENGINE = Path(__file__).parent.parent / "fake_engine" / "fake_engine.py"
PROFILED_ENGINE = Path(__file__).parent / "profiled_engine.py"
P4_BANDWIDTH = 192e9
H200_BANDWIDTH = 4.8e12
NVPROF = """#!{python}
# Runs the program behind its options, and writes a database when that ends.
import signal, sqlite3, subprocess, sys
options = sys.argv[1:]
target = options[options.index("--export-profile") + 1]
child = subprocess.Popen(options[options.index("--export-profile") + 2 :])
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
code = child.wait()
connection = sqlite3.connect(target.replace("%p", str(child.pid)))
connection.executescript('''{tables}''')
connection.execute("insert into StringTable values (1, 'Tesla P4'), (2, 'decode_matmul_q4_k')")
connection.execute("insert into CUPTI_ACTIVITY_KIND_DEVICE values (1, 192224000, 1)")
connection.execute("insert into CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL values (1, 5000000, 35000000, 0, 13, 2)")
connection.commit()
sys.exit(code)
"""


def write_trace(path: Path, *events: dict) -> Path:
    path.write_text(json.dumps({"traceEvents": list(events)}))
    return path


def operator(name: str, start: float, duration: float, **arguments: object) -> dict:
    return {
        "ph": "X",
        "cat": "cpu_op",
        "name": name,
        "pid": 1,
        "tid": 1,
        "ts": start,
        "dur": duration,
        "args": arguments,
    }


class TestCpuTrace:
    def test_recorded(self) -> None:
        """SGLang's own record: one step, whose products take the most."""
        timeline = read_trace(CPU_TRACE)
        assert (timeline.device, timeline.steps) == ("CPU", 1)
        summary = summarise(timeline)
        assert summary.kinds[0].name == "matmul"
        assert summary.kernels[0].name == "aten::mm"
        assert sum(row.share for row in summary.kinds) == pytest.approx(1.0)

    def test_time_of_what_an_operator_calls_is_not_its_own(self, tmp_path: Path) -> None:
        """Times add up to the time in which something ran, however calls are nested."""
        trace = write_trace(
            tmp_path / "t.json",
            operator("aten::linear", 0, 100),
            operator("aten::mm", 10, 60),
            operator("aten::add", 75, 20),
            operator("aten::mul", 200, 50),
        )
        own = {kernel.name: round(kernel.seconds * 1e6) for kernel in read_trace(trace).kernels}
        assert own == {"aten::linear": 20, "aten::mm": 60, "aten::add": 20, "aten::mul": 50}
        assert read_trace(trace).busy_seconds == pytest.approx(150e-6, rel=0.5)

    def test_bytes_of_a_product(self, tmp_path: Path) -> None:
        """Both operands and the result, in their types."""
        shapes = {"Input Dims": [[4, 576], [576, 960]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
        trace = write_trace(tmp_path / "t.json", operator("aten::mm", 0, 10, **shapes))
        [kernel] = read_trace(trace).kernels
        assert kernel.bytes == 2 * (4 * 576 + 576 * 960 + 4 * 960)

    def test_views_move_nothing(self, tmp_path: Path) -> None:
        """An operator that only describes memory has no bandwidth."""
        shapes = {"Input Dims": [[4, 576]], "Input type": ["float"]}
        trace = write_trace(tmp_path / "t.json", operator("aten::view", 0, 10, **shapes))
        assert read_trace(trace).kernels[0].bytes is None


class TestGpuTrace:
    def test_kernels_and_not_operators(self, tmp_path: Path) -> None:
        """If there are kernels, the operators only say what the kernels read."""
        shapes = {"Input Dims": [[1, 2048], [2048, 2048]], "Input type": ["c10::Half", "c10::Half"], "External id": 7}
        kernel = {"cat": "kernel", "name": "gemv2T_kernel_val", "tid": 7, "args": {"External id": 7, "stream": 7}}
        copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "tid": 7, "args": {"bytes": 8, "stream": 7}}
        trace = write_trace(
            tmp_path / "t.json",
            operator("aten::mm", 0, 50, **shapes),
            {"ph": "X", "pid": 0, "ts": 100, "dur": 50, **kernel},
            {"ph": "X", "pid": 0, "ts": 160, "dur": 2, **copy},
        )
        timeline = read_trace(trace, steps=3)
        moved = 2 * (2048 + 2048 * 2048 + 2048)
        assert [(k.name, k.bytes, k.stream) for k in timeline.kernels] == [
            ("gemv2T_kernel_val", moved, 7),
            ("Memcpy DtoH", 8, 7),
        ]
        assert timeline.steps == 3
        assert timeline.wall_seconds == pytest.approx(62e-6)
        row = summarise(timeline, bandwidth=P4_BANDWIDTH).kernels[0]
        assert row.bytes_per_second == pytest.approx(moved / 50e-6)
        assert row.roof_ratio == pytest.approx(moved / 50e-6 / P4_BANDWIDTH)

    def test_operator_with_several_kernels(self, tmp_path: Path) -> None:
        """What an operator reads is counted once, with its longest kernel; all of them do its kind of work."""
        shapes = {"Input Dims": [[1, 64], [64, 64]], "Input type": ["c10::Half", "c10::Half"], "External id": 7}
        kernels = [
            {
                "ph": "X",
                "cat": "kernel",
                "pid": 0,
                "tid": 7,
                "name": name,
                "ts": ts,
                "dur": dur,
                "args": {"External id": 7},
            }
            for name, ts, dur in (("x_first", 100, 5), ("x_main", 110, 50), ("x_reduce", 170, 5))
        ]
        timeline = read_trace(write_trace(tmp_path / "t.json", operator("aten::mm", 0, 50, **shapes), *kernels))
        assert [kernel.bytes for kernel in timeline.kernels] == [0, 2 * (64 + 64 * 64 + 64), 0]
        assert {kernel.kind for kernel in timeline.kernels} == {"matmul"}

    def test_recorded(self) -> None:
        """A real record: kernels of a GPU by their own names, steps by their marks, bytes by their operators."""
        timeline = read_trace(GPU_TRACE)
        assert (timeline.device, timeline.steps) == ("NVIDIA H200", 3)
        summary = summarise(timeline, bandwidth=H200_BANDWIDTH)
        kinds = {row.name: row for row in summary.kinds}
        assert summary.kinds[0].name == "matmul"
        # Two layers of four products each, and the head, in three steps: 27, and what split ones need besides.
        assert kinds["matmul"].count >= 27
        assert kinds["attention"].count == 6
        weights = 2 * (2 * (2048 * 6144 + 2048 * 2048 + 2048 * 8192 + 8192 * 2048) + 2048 * 32000)
        moved = (kinds["matmul"].bytes_per_second or 0) * kinds["matmul"].seconds
        assert 3 * weights < moved < 3 * weights * 1.01
        assert 0.3 < (kinds["matmul"].roof_ratio or 0) < 1


@pytest.fixture(scope="module")
def served() -> Summary:
    """The record of an H100, held against what a step reads."""
    step = StepBytes(sum(SERVED_MATRICES.values()) + SERVED_NORMS, SERVED_MATRICES, SERVED_KV)
    return summarise(read_trace(SERVED_TRACE), bandwidth=H100_BANDWIDTH, step=step)


class TestServedTrace:
    """A record of our kernels, all in one replayed graph: only their names say what they read."""

    @pytest.mark.parametrize(
        ("name", "calls", "seconds", "step_bytes"),
        [
            ("decode_matmul_Q4_K_n2", 3 * 112, Q4_K_SECONDS, SERVED_MATRICES["Q4_K"]),
            ("decode_matmul_Q6_K_n2", 3 * 33, Q6_K_SECONDS, SERVED_MATRICES["Q6_K"]),
            ("attention_decode_F16_d128_g4", 3 * 32, ATTENTION_SECONDS, SERVED_KV),
        ],
    )
    def test_kernels(self, served: Summary, name: str, calls: int, seconds: float, step_bytes: int) -> None:
        """Bytes of a step x 3 steps / time."""
        [row] = [row for row in served.kernels if row.name == name]
        assert (row.count, row.seconds) == (calls, pytest.approx(seconds))
        assert row.bytes_per_second == pytest.approx(3 * step_bytes / seconds)
        assert row.roof_ratio == pytest.approx(3 * step_bytes / seconds / H100_BANDWIDTH)

    def test_kinds(self, served: Summary) -> None:
        """The products are all matrices but the embedding; norms that quantise, and the lookup, are not of them."""
        kinds = {row.name: row for row in served.kinds}
        seconds = Q4_K_SECONDS + Q6_K_SECONDS + QUANTIZE_SECONDS
        assert (kinds["matmul"].count, kinds["matmul"].seconds) == (3 * (112 + 33 + 1), pytest.approx(seconds))
        assert kinds["matmul"].bytes_per_second == pytest.approx(3 * sum(SERVED_MATRICES.values()) / seconds)
        # rms_norm 65, rope 32, silu 32 and the lookup of a step.
        assert (kinds["norm"].count, kinds["norm"].seconds) == (3 * 130, pytest.approx(NORM_SECONDS))
        assert kinds["norm"].bytes_per_second is None

    def test_whole_steps(self, served: Summary) -> None:
        """The head of the table: 3 x 4623.9 MB in 16.3 ms are 849 of 3352 GB/s."""
        assert to_text(served).splitlines()[:3] == [
            "NVIDIA H100 80GB HBM3: 3 steps in 16.3 ms, a kernel ran 96% of the time (5.45 ms a step)",
            "memory: 3352 GB/s",
            "a step reads at least 4623.9 MB: 25.3% of the roof, waiting included",
        ]

    def test_the_plan_says_the_same(self) -> None:
        """What the agent serves for this file on this card is what is computed here by hand."""
        card = unknown_card("H100 80GB HBM3", 80 << 30)
        plan = make_plan(LLAMA_3_8B, card, request(card_bytes=card.memory_bytes)).to_json()
        expected = StepBytes(sum(SERVED_MATRICES.values()) + SERVED_NORMS, SERVED_MATRICES, SERVED_KV)
        assert StepBytes.of_plan(json.loads(json.dumps(plan)), 54) == expected

    def test_plan_of_an_older_agent(self) -> None:
        """It reports the resident weights only: the kinds have figures, the kernels have none."""
        step = StepBytes.of_plan({"weights_bytes": 4_912_365_568, "kv_bytes_per_token": 131_072}, 54)
        summary = summarise(read_trace(SERVED_TRACE), step=step)
        kinds, kernels = ({row.name: row for row in rows} for rows in (summary.kinds, summary.kernels))
        assert kinds["matmul"].bytes_per_second == pytest.approx(3 * 4_912_365_568 / kinds["matmul"].seconds)
        assert kernels["decode_matmul_Q4_K_n2"].bytes_per_second is None
        assert kernels["attention_decode_F16_d128_g4"].bytes_per_second is not None
        assert summary.step_bytes == 4_912_365_568 + SERVED_KV


class TestBadTraces:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not a trace, or is cut off: Expecting value: line 1 column 1 (char 0)"),
            (b"[]", "is not a trace: it holds a list"),
            (b"{}", "is not a trace: it has no traceEvents"),
            (b'{"traceEvents": []}', "holds neither kernels nor operators: nothing ran while it was recorded"),
        ],
    )
    def test_messages(self, tmp_path: Path, content: bytes, message: str) -> None:
        """A file that is not a trace is refused with its defect."""
        path = tmp_path / "t.json"
        path.write_bytes(content)
        with pytest.raises(TraceError) as caught:
            read_trace(path)
        assert str(caught.value) == f"{path} {message}"

    @given(cut=st.integers(1, 2000))
    def test_half_written_file_is_not_whole(self, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        """A trace that SGLang still writes is waited for, wherever it ends."""
        path = tmp_path_factory.mktemp("cut") / "t.trace.json.gz"
        path.write_bytes(CPU_TRACE.read_bytes()[:-cut])
        assert not is_whole(path)

    def test_whole_file(self) -> None:
        """And a whole one is whole."""
        assert is_whole(CPU_TRACE)


# As libcuinj64.so.11.8.87 creates them, without the columns that are not read.
NVPROF_TABLES = """
create table StringTable( _id_ integer primary key autoincrement, value text not null unique );
create table CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL(_id_ integer primary key autoincrement, start int not null,
  end int not null, deviceId int not null, streamId int not null, name int not null);
create table CUPTI_ACTIVITY_KIND_MEMCPY(_id_ integer primary key autoincrement, bytes int not null, start int not null,
  end int not null, streamId int not null);
create table CUPTI_ACTIVITY_KIND_DEVICE(_id_ integer primary key autoincrement, globalMemoryBandwidth int not null,
  name int not null);
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "nvprof-1.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(NVPROF_TABLES)
    connection.execute(
        "insert into StringTable values (1, 'Tesla P4'), (2, 'decode_matmul_q4_k'), (3, 'paged_attention')"
    )
    connection.execute("insert into CUPTI_ACTIVITY_KIND_DEVICE values (1, 192224000, 1)")
    kernels = "insert into CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL values (?, ?, ?, 0, 13, ?)"
    connection.execute(kernels, (1, 5_000_000, 35_000_000, 2))
    connection.execute(kernels, (2, 36_000_000, 38_000_000, 3))
    connection.execute("insert into CUPTI_ACTIVITY_KIND_MEMCPY values (1, 4096, 40000000, 40010000, 13)")
    connection.commit()
    connection.close()
    return path


class TestNvprof:
    def test_database(self, database: Path) -> None:
        """Kernels and copies with their times, and the bandwidth that the driver reports."""
        assert is_nvprof(database)
        timeline = read_nvprof(database, steps=1)
        assert [(k.name, round(k.start * 1e3, 3), round(k.seconds * 1e3, 3), k.bytes) for k in timeline.kernels] == [
            ("decode_matmul_q4_k", 0.0, 30.0, None),
            ("paged_attention", 31.0, 2.0, None),
            ("memcpy", 35.0, 0.01, 4096),
        ]
        assert (timeline.device, timeline.device_bandwidth) == ("Tesla P4", 192.224e9)

    def test_chrome_trace_of_it(self, database: Path, tmp_path: Path) -> None:
        """What a viewer gets says the same."""
        timeline = read_nvprof(database)
        write_chrome_trace(timeline, tmp_path / "t.trace.json")
        again = read_trace(tmp_path / "t.trace.json")
        assert again.device == "Tesla P4"
        assert [(k.name, k.bytes, k.stream) for k in again.kernels] == [
            (k.name, k.bytes, k.stream) for k in timeline.kernels
        ]
        assert [k.seconds for k in again.kernels] == pytest.approx([k.seconds for k in timeline.kernels])

    def test_database_without_kernels(self, tmp_path: Path) -> None:
        """A process that never touched the GPU leaves an empty database."""
        path = tmp_path / "empty.sqlite"
        sqlite3.connect(path).executescript(NVPROF_TABLES).connection.close()
        with pytest.raises(TraceError) as caught:
            read_nvprof(path)
        assert str(caught.value) == f"{path} holds no kernel: nothing ran on the GPU while it was recorded"

    def test_wrapper(self, tmp_path: Path) -> None:
        """The server runs under nvprof, with everything quoted that needs it; any other command runs unchanged."""
        folder = tmp_path / "a folder"
        folder.mkdir()
        for name in ("nvprof", "python"):
            program = folder / name
            program.write_text(f'#!/bin/sh\necho {name}; for a in "$@"; do echo "[$a]"; done\n')
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        wrapper = write_nvprof_wrapper(folder, str(folder / "nvprof"), str(folder / "python"))
        asked = {}
        for arguments in (["-m", "sglang.launch_server", "--port", "1"], ["-m", "sglang_pascal", "prepare", "a b"]):
            done = subprocess.run([str(wrapper), *arguments], capture_output=True, text=True, check=True)
            asked[arguments[1]] = done.stdout.splitlines()
        assert asked["sglang_pascal"] == ["python", "[-m]", "[sglang_pascal]", "[prepare]", "[a b]"]
        assert asked["sglang.launch_server"] == [
            "nvprof",
            "[--profile-child-processes]",
            "[--profile-from-start]",
            "[off]",
            "[--openacc-profiling]",
            "[off]",
            "[--quiet]",
            "[--export-profile]",
            f"[{folder}/nvprof-%p.sqlite]",
            f"[{folder}/python]",
            "[-m]",
            "[sglang.launch_server]",
            "[--port]",
            "[1]",
        ]


class TestRoofline:
    def test_weights_are_read_once_a_step(self) -> None:
        """The products' bandwidth follows from the weights, not from single kernels."""
        kernels = tuple(Kernel("decode_matmul_q4_k", 0.03 * i, 0.025, None) for i in range(10))
        timeline = Timeline("Tesla P4", kernels, steps=10)
        summary = summarise(timeline, bandwidth=P4_BANDWIDTH, step=StepBytes(4_000_000_000, kv_cache=100_000_000))
        [products] = summary.kinds
        assert products.bytes_per_second == pytest.approx(160e9)
        assert products.roof_ratio == pytest.approx(160 / 192)
        assert summary.busy_ratio == pytest.approx(0.25 / 0.295)
        assert summary.step_roof_ratio == pytest.approx(4.1e9 * 10 / 0.295 / P4_BANDWIDTH)

    def test_text(self) -> None:
        """The tables as a terminal shows them."""
        kernels = (Kernel("decode_matmul_q4_k", 0.0, 0.030, None), Kernel("paged_attention", 0.030, 0.010, 480_000_000))
        summary = summarise(Timeline("Tesla P4", kernels, 1), bandwidth=P4_BANDWIDTH, step=StepBytes(4_608_000_000))
        assert to_text(summary) == (
            "Tesla P4: 1 steps in 40.0 ms, a kernel ran 100% of the time (40.00 ms a step)\n"
            "memory: 192 GB/s\n"
            "a step reads at least 4608.0 MB: 60.0% of the roof, waiting included\n"
            "\n"
            "kind of work                                                   calls        ms  share    GB/s  roof\n"
            "matmul                                                             1     30.00  75.0%   153.6   80%\n"
            "attention                                                          1     10.00  25.0%    48.0   25%\n"
            "\n"
            "kernel                                                         calls        ms  share    GB/s  roof\n"
            "decode_matmul_q4_k                                                 1     30.00  75.0%       -     -\n"
            "paged_attention                                                    1     10.00  25.0%    48.0   25%\n"
        )

    def test_without_roof_or_bytes(self) -> None:
        """What is not known is left out and not guessed."""
        summary = summarise(Timeline("CPU", (Kernel("aten::mm", 0.0, 1.0, None),), 0))
        assert (summary.kernels[0].bytes_per_second, summary.kernels[0].roof_ratio, summary.step_roof_ratio) == (
            None,
            None,
            None,
        )

    def test_kernels_that_read_the_same_share_it(self) -> None:
        """By their calls: a request joined after one of three steps of two products each."""
        one, two = "decode_matmul_Q8_0_16bit_n1", "decode_matmul_Q8_0_16bit_n2"
        kernels = tuple(Kernel(name, 0.01 * i, 0.001, None) for i, name in enumerate([one] * 2 + [two] * 4))
        rows = summarise(Timeline("Tesla P4", kernels, 3), step=StepBytes(90, {"Q8_0": 60}, None)).kernels
        moved = {row.name: (row.bytes_per_second or 0) * row.seconds for row in rows}
        assert moved == {one: pytest.approx(60), two: pytest.approx(120)}

    @pytest.mark.parametrize(("steps", "matrices"), [(0, {"Q8_0": 60}), (3, {"Q4_K": 60}), (3, {}), (3, None)])
    def test_nothing_is_claimed_of_what_is_not_known(self, steps: int, matrices: dict[str, int] | None) -> None:
        """Without steps, or where the plan holds nothing in that type, a kernel has no figure."""
        timeline = Timeline("Tesla P4", (Kernel("tile_matmul_Q8_0_16bit_n32", 0.0, 0.001, None),), steps)
        assert summarise(timeline, step=StepBytes(90, matrices)).kernels[0].bytes_per_second is None

    @pytest.mark.parametrize(
        ("name", "source"),
        [
            ("decode_matmul_Q4_K_8bit_n16", "Q4_K"),
            ("tile_matmul_Q8_0_16bit_n32", "Q8_0"),
            ("half_matmul_n1", "F16"),
            ("attention_decode_I8_d64_g1", KV_CACHE),
            ("attention_combine", None),
            ("attention_prefill_F16_d128", None),
            ("dequantize_Q4_K", None),
            ("repack_Q4_K", None),
            ("quantize", None),
            ("ampere_sgemm_32x32_sliced1x4_tn", None),
        ],
    )
    def test_what_names_tell(self, name: str, source: str | None) -> None:
        """Only kernels that read all of something in each step."""
        assert read_by(name) == source

    def test_every_type_with_kernels_is_told(self) -> None:
        """Whatever types the plugin has kernels for."""
        formats = pytest.importorskip("sglang_pascal.kernels.formats", reason="sglang-pascal is not installed")
        for kind in formats.FORMATS:
            assert read_by(f"decode_matmul_{kind}_16bit_n4") == read_by(f"tile_matmul_{kind}_8bit_n64") == kind
            assert kind_of(f"dequantize_{kind}") == "norm"

    @given(st.lists(st.tuples(st.floats(0, 100), st.floats(1e-6, 10)), min_size=1, max_size=30))
    def test_busy_time_is_a_union(self, spans: list[tuple[float, float]]) -> None:
        """Overlapping kernels count once: never more than the wall, never less than the longest."""
        timeline = Timeline("x", tuple(Kernel("k", start, length, None) for start, length in spans), 0)
        # Adding a start of up to 100 s costs the last digits.
        assert timeline.busy_seconds <= timeline.wall_seconds + 1e-9
        assert timeline.busy_seconds >= max(length for _, length in spans) - 1e-9

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("decode_matmul_q4_k", "matmul"),
            ("ampere_sgemm_32x32_sliced1x4_tn", "matmul"),
            ("aten::mm", "matmul"),
            ("attention_decode_f16_128", "attention"),
            ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
            ("vectorized_layer_norm_kernel", "norm"),
            ("rms_norm_quantize", "norm"),
            ("silu_mul_quantize", "norm"),
            ("dequantize_Q4_K", "norm"),
            ("quantize", "matmul"),
            ("kDequantizeBlockwise<__half, 512, 64, 8, 2>", "matmul"),
            ("Memcpy DtoH (Device -> Pageable)", "copy"),
            ("void at::native::reduce_kernel<512, 1, ArgMaxOps>", "sampling"),
            ("vectorized_elementwise_kernel", "other"),
        ],
    )
    def test_kinds(self, name: str, kind: str) -> None:
        """Names show what kernels do."""
        assert kind_of(name) == kind


class Engine(BaseHTTPRequestHandler):
    """Streams tokens slowly, and writes a trace on request, as SGLang does, or does not."""

    protocol_version = "HTTP/1.1"
    fault = ""
    asked: ClassVar[list[tuple[str, dict]]] = []

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null") or {}
        type(self).asked.append((self.path, body))
        if self.path == "/generate":
            self._stream()
            return
        if self.path == "/start_profile" and self.fault != "no trace":
            trace = Path(body["output_dir"]) / "1.TP-0.trace.json.gz"
            threading.Thread(target=self._write, args=(trace,)).start()
        self.send_response(500 if self.fault == "refuses" else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"no" if self.fault == "refuses" else b"ok")

    @staticmethod
    def _write(trace: Path) -> None:
        """In two halves, as a large file comes."""
        content = CPU_TRACE.read_bytes()
        trace.write_bytes(content[: len(content) // 2])
        time.sleep(0.5)
        trace.write_bytes(content)

    def _stream(self) -> None:
        self.send_response(401 if self.fault == "no key" else 200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(0 if self.fault in ("no key", "silent") else 600):
            try:
                self.wfile.write(b'data: {"text": "a"}\n\n')
            except OSError:
                return
            time.sleep(0.01)


@pytest.fixture
def engine() -> Iterator[tuple[Target, type[Engine]]]:
    handler = type("ThisEngine", (Engine,), {"asked": [], "fault": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Target(f"http://127.0.0.1:{server.server_port}", "secret"), handler
    server.shutdown()
    thread.join()
    server.server_close()


class TestSession:
    def test_record(self, engine: tuple[Target, type[Engine]], tmp_path: Path) -> None:
        """Requests decode before the record begins, and the trace is taken when it is whole."""
        target, handler = engine
        recording = record(target, tmp_path, steps=5, load=Load(requests=3, prompt_tokens=8), timeout=60)
        assert recording.trace == tmp_path / "1.TP-0.trace.json.gz"
        assert read_trace(recording.trace).steps == 1
        assert recording.context_tokens >= 3 * (8 + 2)
        assert [path for path, _ in handler.asked] == ["/generate"] * 3 + ["/start_profile"]
        assert handler.asked[0][1]["sampling_params"]["ignore_eos"]
        assert handler.asked[-1][1] == {
            "output_dir": str(tmp_path),
            "with_stack": False,
            "record_shapes": True,
            "activities": ["CPU", "GPU"],
            "num_steps": 6,  # the step that runs already is not whole
        }

    def test_external_profiler(self, engine: tuple[Target, type[Engine]], tmp_path: Path) -> None:
        """nvprof is switched on and off by CUDA's own calls; its record comes later."""
        target, handler = engine
        recording = record(target, tmp_path, steps=5, load=Load(), timeout=60, external=True)
        assert recording.trace is None
        assert [path for path, _ in handler.asked] == ["/generate", "/start_profile", "/stop_profile"]
        assert handler.asked[1][1]["activities"] == ["CUDA_PROFILER"]

    def test_traffic_of_others(self, engine: tuple[Target, type[Engine]], tmp_path: Path) -> None:
        """Without a load nothing is sent but the order to record."""
        target, handler = engine
        assert record(target, tmp_path, steps=5, load=None, timeout=60).context_tokens == 0
        assert [path for path, _ in handler.asked] == ["/start_profile"]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("no key", "no request got its first tokens: the engine answered 401 to a request"),
            ("silent", "no request got its first tokens within 1 s"),
            ("refuses", "{url}/start_profile answered 500: no"),
            (
                "no trace",
                "no trace appeared in {folder} (can the engine's user write there? are requests running?) within 1 s",
            ),
        ],
    )
    def test_failures(self, engine: tuple[Target, type[Engine]], tmp_path: Path, fault: str, message: str) -> None:
        """If an engine does not decode, refuses or writes nothing, the message names what is missing."""
        target, handler = engine
        handler.fault = fault
        with pytest.raises(EngineError) as caught:
            record(target, tmp_path, steps=5, load=Load(), timeout=1)
        assert str(caught.value) == message.format(url=target.url, folder=tmp_path)

    def test_no_engine(self, tmp_path: Path) -> None:
        """If nothing listens, the message names the address."""
        with pytest.raises(EngineError) as caught:
            record(Target("http://127.0.0.1:9"), tmp_path, steps=5, load=None, timeout=1)
        assert str(caught.value) == (
            "failed to reach http://127.0.0.1:9/start_profile: [Errno 111] Connection refused; is the instance running?"
        )


class TestOwnEngine:
    def test_instance_for_a_while(self, tmp_path: Path) -> None:
        """An instance is served on ports of its own, and is gone afterwards."""
        settings = {"device": "cpu", "engine_executable": str(FAKE_ENGINE), "cache_dir": str(tmp_path / "cache")}
        with serving(settings, None, tmp_path / "serve.log", 120) as (engine, agent):
            assert engine != agent
            port = engine.rpartition(":")[2]
            assert f"--port {port}" in _command_lines()
        assert f"--port {port}" not in _command_lines()

    def test_instance_that_cannot_start(self, tmp_path: Path) -> None:
        """Its last words are in the message."""
        settings = {"model": "/no/such/model.gguf", "device": "cpu"}
        with (
            pytest.raises(EngineError, match=r"the instance ended with exit code 3: .*no such file"),
            serving(settings, None, tmp_path / "serve.log", 120),
        ):
            pass


def _command_lines() -> str:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


class TestCommand:
    def test_read(self) -> None:
        """A record is summed up without any engine."""
        command = [sys.executable, "-m", "pascaline", "profile", "--read", str(CPU_TRACE), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        summary = json.loads(done.stdout)
        assert (summary["device"], summary["steps"]) == ("CPU", 1)
        assert summary["kernels"][0]["name"] == "aten::mm"

    @pytest.mark.parametrize(
        ("card", "lines", "memory"),
        [
            ("nvidia-h100-80gb-hbm3", "nvmlDeviceGetMemoryBusWidth = 5120", "memory: 3352 GB/s"),
            ("nvidia-h100-80gb-hbm3", "", ""),
            ("tesla-p4", "nvmlDeviceGetMemoryBusWidth = 256", ""),
        ],
    )
    def test_roof_of_a_card_without_a_profile(self, tmp_path: Path, card: str, lines: str, memory: str) -> None:
        """NVML reports it for a card of this host; for another card, or without an answer, it is absent and no failure."""
        scenario = tmp_path / "s.nvml"
        write_scenario(scenario, (CAPTURES / f"{card}.nvml").read_text() + lines + "\n")
        text = self._table(fake_nvml_environment(scenario))
        assert [line for line in text.splitlines() if line.startswith("memory")] == [memory] * bool(memory)
        roofs = [line.split()[-1] for line in text.splitlines() if line.startswith("void at::native::reduce_kernel")]
        assert roofs == ["1%" if memory else "-"]

    def test_roof_without_nvml(self, tmp_path: Path) -> None:
        """A host without a driver reads records of others."""
        scenario = tmp_path / "s.nvml"
        write_scenario(scenario, "[library]\nnvmlInit = error LIBRARY_NOT_FOUND\n")
        assert "memory:" not in self._table(fake_nvml_environment(scenario))

    @staticmethod
    def _table(environment: Mapping[str, str]) -> str:
        command = [sys.executable, "-m", "pascaline", "profile", "--read", str(SERVED_TRACE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def test_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        """A record never mixes with another."""
        (tmp_path / "x").touch()
        command = [sys.executable, "-m", "pascaline", "profile", "-o", str(tmp_path), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (
            2,
            f"pascaline profile: --output: {tmp_path} is not empty, must be a new folder\n",
        )

    def test_nvprof_that_is_not_here(self, tmp_path: Path) -> None:
        """What brings it is in the message."""
        if shutil.which("nvprof"):
            pytest.skip("nvprof is here")
        command = [sys.executable, "-m", "pascaline", "profile", "--tool", "nvprof", "-o", str(tmp_path / "o")]
        done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (
            8,
            "pascaline profile: nvprof is not on PATH; it comes with CUDA 11.8 "
            "(NixOS: hardware.pascaline.cuda.enable = true;)\n",
        )

    def test_instance_of_its_own(self, tmp_path: Path) -> None:
        """An instance is started for the record, and gone afterwards; the plan says what a step reads."""
        output, key = tmp_path / "record", tmp_path / "key"
        key.write_text("sesame\n")
        command = [sys.executable, "-m", "pascaline", "profile", "--device", "cpu", "--json", "-o", str(output)]
        command += ["--engine-executable", str(PROFILED_ENGINE), "--cache-dir", str(tmp_path / "cache")]
        command += ["--api-key-file", str(key)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines() == [
            "pascaline profile: starting an instance …",
            "pascaline profile: waiting for the first tokens …",
            "pascaline profile: recording …",
            f"pascaline profile: the trace is {output / '1-TP-0.trace.json.gz'}; open it in ui.perfetto.dev",
        ]
        summary = json.loads(done.stdout)
        assert summary["kernels"][0]["name"] == "aten::mm"
        assert summary["step_bytes"] > 90e6
        products = summary["kinds"][0]["bytes_per_second"] * summary["kinds"][0]["seconds"]
        # SmolLM2's parameters without its 61 norms of 576, in bfloat16; its embedding is its output as well.
        assert products == pytest.approx(2 * (134_515_008 - 61 * 576))

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
    def test_instance_is_gone_however_it_ends(self, tmp_path: Path, number: signal.Signals, code: int) -> None:
        """Else an engine would hold the GPU's memory for ever."""
        cache = str(tmp_path / "cache")
        command = [sys.executable, "-m", "pascaline", "profile", "--device", "cpu", "-o", str(tmp_path / "record")]
        command += ["--engine-executable", str(PROFILED_ENGINE), "--cache-dir", cache]
        environment = os.environ | {"FAKE_ENGINE_FAULTS": "start_seconds=300"}
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        wait_until("the engine", lambda: f"launch_server --model-path {cache}" in _command_lines())
        process.send_signal(number)
        assert process.wait(PATIENCE) == code
        wait_until("their end", lambda: cache not in _command_lines())

    def test_under_nvprof(self, tmp_path: Path) -> None:
        """With nvprof the engine runs inside of it, and its database becomes the trace."""
        programs = tmp_path / "bin"
        programs.mkdir()
        nvprof = programs / "nvprof"
        nvprof.write_text(NVPROF.format(python=sys.executable, tables=NVPROF_TABLES))
        nvprof.chmod(0o755)
        output = tmp_path / "record"
        command = [sys.executable, "-m", "pascaline", "profile", "--tool", "nvprof", "--device", "cpu", "--steps", "7"]
        command += ["--engine-executable", str(PROFILED_ENGINE), "--cache-dir", str(tmp_path / "cache")]
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, text=True, timeout=200, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Tesla P4: 7 steps in 30.0 ms, a kernel ran 100% of the time (4.29 ms a step)\n")
        assert done.stderr.splitlines()[-1] == (
            f"pascaline profile: the trace is {output / 'nvprof.trace.json'}; open it in ui.perfetto.dev"
        )
        assert read_trace(output / "nvprof.trace.json").kernels[0].name == "decode_matmul_q4_k"

    @pytest.mark.engine
    @pytest.mark.slow("starts a real engine of its own")
    def test_real_engine(self, tmp_path: Path) -> None:
        """SGLang on the CPU, started for the record: every step is in it, and most of it is matrix products."""
        output = tmp_path / "record"
        command = [sys.executable, "-m", "pascaline", "profile", "--device", "cpu", "--context-length", "1024"]
        command += ["--steps", "5", "--requests", "2", "--json", "-o", str(output)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["steps"] >= 5
        assert summary["kinds"][0]["name"] == "matmul"
        assert summary["kinds"][0]["bytes_per_second"] > 0
        assert summary["step_bytes"] > 100e6
        [trace] = output.glob("*.trace.json.gz")
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
