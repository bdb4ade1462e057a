"""The programs that measure a GPU, on a machine without one: what they say, and that they say it before they begin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from sglang_pascal import selftest
from sglang_pascal.checkpoint.prepare import prepare
from support.models import SHAPES, write_gguf

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    clean = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=clean)


@pytest.fixture(scope="module")
def report():
    """gpu_report.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu_report", BENCHMARKS / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # it imports a script beside it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def first_hour():
    """first_hour_on_pascal.py as a module."""
    spec = importlib.util.spec_from_file_location("first_hour", BENCHMARKS / "first_hour_on_pascal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "arguments"), [("gpu_report.py", ["{}"]), ("first_hour_on_pascal.py", ["{}/f.json"])])
def test_without_a_gpu_nothing_is_written(name, arguments, tmp_path):
    done = run(name, *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 6
    program = name.removesuffix(".py")
    assert done.stderr == f"{program}: error: no NVIDIA GPU is visible; run it where nvidia-smi lists one\n"
    assert list(tmp_path.iterdir()) == []


def test_the_owner_of_a_card_is_told_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    done = run("first_hour_on_pascal.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 8
    assert done.stderr == (
        "first_hour_on_pascal: error: there is no torch here; "
        "install torch and sglang-pascal as python/sglang-pascal/README.md says, or run ./dev sync\n"
    )


def test_a_requantised_copy_is_the_same_model_in_other_types(build_model, tmp_path):
    build_model("llama-3.2", tmp_path / "m.gguf")
    done = run("requantize.py", str(tmp_path / "m.gguf"), str(tmp_path / "out.gguf"), "Q8_0", "F16", "Q4_1")
    assert done.returncode == 0, done.stderr
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("m.gguf", "out.gguf"))
    assert {name: field.contents() for name, field in after.fields.items() if not name.startswith("GGUF.")} == {
        name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")
    }
    kinds = [tensor.tensor_type.name for tensor in after.tensors if len(tensor.shape) > 1]
    assert kinds[:4] == ["Q8_0", "F16", "Q4_1", "Q8_0"]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert old.name == new.name
        values, copy = (gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in (old, new))
        assert abs(values - copy).max() <= abs(values).max() / 15


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b"])
def test_the_models_that_the_report_makes_can_be_served(name, tmp_path):
    """In the shapes of real ones but for their size: their tokeniser and their RoPE factors must be consistent."""
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    path = write_gguf(tmp_path / "m.gguf", replace(SHAPES[name], **size), "Q4_K_M")
    prepare(path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == ("llama3" if name.startswith("llama") else "default")
    assert len(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]) == config["vocab_size"]


class TestFirstHour:
    """What the report of a card's owner says in words."""

    def parts(
        self, first_hour, lanes: dict[str, float], times: dict[tuple[int, int], float], speeds: list[float]
    ) -> dict:
        products = [
            {"name": name, "bits": bits, "n": n, "cold_us": us * (1 + i)}
            for i, name in enumerate(first_hour.NAMES)
            for (bits, n), us in times.items()
        ]
        windows = [{"macs_per_second": speed, "clocks.sm": "886 MHz", "power.draw": "75 W"} for speed in speeds]
        attention = [
            {
                "phase": phase,
                "kv_type": "F16",
                "sequences": 1,
                "length": length,
                "ours_us": 100.0,
                "kv_bytes": 8_000_000,
            }
            for phase, length in (("decode", 512), ("decode", 4096), ("prefill", 4096))
        ]
        found = {
            "rates": {"lanes_per_clock_and_multiprocessor": lanes, "read_bytes_per_second": 160e9},
            "products": products,
            "attention": attention,
            "sustained": windows,
            "llama-bench": {
                "rows": [{"n_prompt": 512, "n_gen": 0, "avg_ts": speed} for speed in (430.5, 410.0)]
                + [{"n_prompt": 0, "n_gen": 32, "avg_ts": 21.25}]
            },
        }
        return {name: {"result": result} for name, result in found.items()}

    def test_what_held_and_what_did_not(self, first_hour):
        lanes = {"shared_broadcast": 8.0, "dp4a": 127.0, "code_11k": 120.0, "code_33k": 119.0, "code_49k": 60.0}
        times = {(16, 1): 100.0, (16, 8): 110.0, (16, 16): 200.0, (16, 17): 240.0, (8, 1): 100.0, (8, 12): 119.0}
        assert first_hour.findings(self.parts(first_hour, lanes, times, [9e12, 8e12, 4.5e12])) == [
            "A 16-byte shared load of one address takes 4.0 clocks; that held: the kernels are made for 4.",
            "dp4a: 127 a clock and multiprocessor, 99% of what Pascal's should be (128).",
            "A loop of 33 KB of code runs at 99% of the speed of one of 11 KB: the instruction cache does not slow such loops.",
            "A loop of 49 KB of code runs at 50% of the speed of one of 11 KB: such loops wait for instructions.",
            "Products of 16 bits take at most a fifth longer than one row's up to 8 rows; throughput falls from 16 to 17 (11%).",
            "Products of 8 bits take at most a fifth longer than one row's up to 12 rows; throughput falls nowhere.",
            "Attention of 1 at 4096 positions (F16) reads keys and values at 50% of the plain read.",
            "After 15 s of a prompt's products the speed is 50% of that of the first 5 s, at a clock of 886 MHz and 75 W.",
            "llama-bench reads a prompt at 430 tok/s and writes an answer at 21.2; benchmarks/race.py compares this engine "
            "with it.",
        ]

    def test_a_load_of_one_clock_is_said_to_differ(self, first_hour):
        found = first_hour.findings(
            {"rates": {"result": {"lanes_per_clock_and_multiprocessor": {"shared_broadcast": 30.0}}}}
        )
        assert found == [
            "A 16-byte shared load of one address takes 1.1 clocks; that did not hold: kernels with fewer rows a lane may be faster."
        ]

    def test_parts_that_failed_are_passed_over(self, first_hour):
        assert (
            first_hour.findings({"rates": {"result": {"failed": "RuntimeError: x"}}, "products": {"skipped": "late"}})
            == []
        )

    def test_torchs_operations_are_held_against_the_cpu(self, first_hour, monkeypatch):
        monkeypatch.setattr(first_hour, "VOCABULARY", 500)
        found = first_hour.torch_operations(torch.device("cpu"))
        assert [case["name"] for case in found if not case["passed"]] == []
        wrong = [
            first_hour._compared("whole", torch.tensor([1, 2]), torch.tensor([1, 3])),
            first_hour._compared("shape", torch.ones(2), torch.ones(3)),
            first_hour._compared("half", torch.tensor([1.0, -torch.inf]), torch.tensor([1.001, -torch.inf])),
            first_hour._compared("nan", torch.tensor([1.0]), torch.tensor([torch.nan])),
        ]
        assert [case["passed"] for case in wrong] == [False] * 4
        close = first_hour._compared("close", torch.tensor([1.0, -torch.inf]), torch.tensor([1.00001, -torch.inf]))
        assert close["passed"]
        product = {"n": 17, "macs_per_second": 2.5e12, "kernels": ["maxwell_fp16_sgemm_fp16_128x64_tn"]}
        parts = {"torch": {"result": [close, *wrong]}, "cublas": {"result": [product, product | {"kernels": []}]}}
        assert first_hour.findings(parts) == [
            "torch's own operations: 1 of 5 give the CPU's results; wrong: whole, shape, half, nan.",
            "A float16 product of 17 rows: 2.50 T MAC/s, by maxwell_fp16_sgemm_fp16_128x64_tn.",
            "A float16 product of 17 rows: 2.50 T MAC/s, by kernels that CUPTI did not name.",
        ]

    def test_llama_bench_runs_where_it_is_and_a_model_is_named(self, first_hour, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert first_hour.llama_bench(None, None) == {"left out": "llama-bench is not on PATH"}
        rows = [{"n_prompt": 512, "n_gen": 0, "avg_ts": 430.5, "cpu_info": "private"}]
        program = tmp_path / "llama-bench"
        program.write_text(f"#!/bin/sh\necho '{json.dumps(rows)}'\n")
        program.chmod(0o755)
        assert first_hour.llama_bench(None, None) == {"left out": "no --model was given"}
        found = first_hour.llama_bench(None, tmp_path / "m.gguf")
        assert found == {"rows": [{"n_prompt": 512, "n_gen": 0, "avg_ts": 430.5}]}


class TestReport:
    def test_every_kernel_is_in_a_group_of_the_sanitizer(self, report):
        """All cases but those of other shapes, whose kernels are the same, and the CUDA graph of them."""
        names = [name for group in report.SANITIZER_GROUPS for name in group]
        checked = [case for case in selftest.CASES if case.startswith(tuple(names))]
        left = [case for case in selftest.CASES if case not in checked and not case.startswith("matmul ")]
        assert left == ["CUDA graph"]
        for name in names:
            assert any(case.startswith(name) for case in selftest.CASES), name

    def test_only_what_is_not_clean_is_named(self, report):
        found = {
            "environment": {"card": "x"},
            "rates": {"stream_bandwidth": 1.0},
            "selftest sm_61": {"state": "clean"},
            "sanitizer": {"state": "1 of 3 groups are not clean", "groups": []},
            "engine": {"a": {"state": "clean"}, "b": {"state": "exit code 1"}},
            "products": [{"state": "never asked"}],
        }
        assert report.unclean(found) == ["sanitizer", "engine: b"]

    def test_parts_of_an_earlier_run_stay_where_card_and_driver_are_the_same(self, report, tmp_path):
        place = {"card": "A", "driver": "1", "torch": "2", "date": "today"}
        path = tmp_path / "kernels-a.json"
        assert report.earlier(path, place) == {}
        path.write_text(json.dumps({"environment": place | {"date": "before"}, "rates": 1}))
        assert report.earlier(path, place)["rates"] == 1
        assert report.earlier(path, place | {"driver": "2"}) == {}

    def test_ggmls_times_are_found_by_type_and_shape(self, report, tmp_path):
        path = tmp_path / "ggml.txt"
        path.write_text(
            "  MUL_MAT(type_a=q4_K,type_b=f32,m=131072,n=1,k=4096,bs=[1,1],nr=[1,1]):  \x1b[1;34m 100 runs\x1b[0m -   153.25 us/run\n"
        )
        shape = {"tensor_type": "Q4_K", "rows": 131072, "columns": 4096, "n": 1, "weight_bytes": 302e6}
        rows = [shape | {"hot_us": us} for us in (61.3, 76.625)]
        report.add_ggml(rows, report.read_ggml(path), 6e12)
        assert rows[1]["share_of_ggml"] == pytest.approx(0.5)
        assert [(row["aim"], row["aim_is"]) for row in rows] == [(0.45, "met"), (0.45, "missed")]
        report.add_ggml(rows, report.read_ggml(path), 3e12)
        assert rows[1]["memory_share_of_ggml"] == pytest.approx(302 / 3 / 153.25)
        assert rows[1]["aim_is"] == "below what memory allows"

    def test_ggmls_attention_is_found_by_sequences_and_positions(self, report, tmp_path):
        path = tmp_path / "ggml.txt"
        line = (
            "  FLASH_ATTN_EXT(hsk=128,hsv=128,nh=8,nr23=[4,1],kv={kv},nb={nb},mask=1,sinks=0,max_bias=0.000000,"
            "logit_softcap=0.000000,prec=f32,type_K={kind},type_V={kind},permute=[0,1,2,3]):  9 runs - {us} us/run - 1 TFLOPS\n"
        )
        path.write_text(
            line.format(kv=4096, nb=1, kind="f16", us="20.00")
            + line.format(kv=4096, nb=1, kind="q8_0", us="99.00")
            + line.format(kv=2048, nb=2048, kind="f16", us="800.00")
        )
        rows = [
            {"phase": phase, "kv_type": kind, "sequences": 1, "length": length, "ours_us": 40.0}
            for phase, kind, length in (("decode", "F16", 4096), ("decode", "INT8", 4096), ("prefill", "F16", 2048))
        ]
        report.add_ggml_attention(rows, report.read_ggml_attention(path))
        assert [row.get("ggml_us") for row in rows] == [20.0, None, 800.0]
        assert rows[0]["share_of_ggml"] == 2.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["x", "--parts", "speed"], "--parts: unknown part 'speed', must be of: rates, selftest, products, "),
            (["x", "--model", "/nowhere.gguf"], "--model: there is no file /nowhere.gguf"),
        ],
    )
    def test_wrong_arguments_are_named(self, report, monkeypatch, capsys, arguments, message):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            report.parse()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
