"""benchmarks/plan_error.py itself: it measures one model at a time, accepts no deviation, and loses no finding."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_error

MIB = plan_error.MIB
EXACT = plan_error.Row("llama", 512, "float16", 1000, 1000, 2000, 2000, 30, 30)
ON_GPU = replace(EXACT, total_plan=3000 * MIB, total_true=3080 * MIB, context_true=500 * MIB, reserved_true=2500 * MIB)

INTERPRETER = """#!{python}
# Stands for the interpreter that has SGLang: notes when it is ready and when it measures.
import json, os, sys, time
log = open({log!r}, "a")
if {broken}:
    sys.exit("no module named sglang")
time.sleep(0.1)
log.write("ready ")
log.flush()
print("noise of an import")
print("ready", flush=True)
flags = json.loads(sys.stdin.readline())
log.write("measured ")
log.flush()
print("noise of a load")
if "--fail" in flags:
    sys.exit("out of memory")
print(json.dumps({{"flags": flags}}))
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    return write_interpreter(tmp_path)


def write_interpreter(folder: Path, *, broken: bool = False) -> Path:
    path = folder / "python"
    path.write_text(INTERPRETER.format(python=sys.executable, log=str(folder / "log"), broken=broken))
    path.chmod(0o755)
    return path


class TestMeasurer:
    def test_all_of_a_group_are_ready_before_one_measures(self, interpreter: Path) -> None:
        measure = plan_error.Measurer("cpu", python=str(interpreter), jobs=3, ahead=2)
        found = [measure(Path("/m"), ["--context-length", str(number)]) for number in range(3)]
        log = (interpreter.parent / "log").read_text().split()
        assert log == ["ready", "ready", "measured", "measured", "ready", "measured"]
        assert found[2] == {"flags": ["--model-path", "/m", "--device", "cpu", "--context-length", "2"]}
        measure.close()

    def test_what_waits_is_ended(self, interpreter: Path) -> None:
        measure = plan_error.Measurer("cpu", python=str(interpreter), jobs=3, ahead=3)
        measure(Path("/m"), [])
        waiting = [child.process for child in measure._waiting]
        measure.close()
        assert len(waiting) == 2
        assert all(process.returncode is not None for process in waiting)

    def test_a_failure_shows_what_the_engine_said(self, interpreter: Path) -> None:
        measure = plan_error.Measurer("cpu", python=str(interpreter))
        with pytest.raises(RuntimeError, match=r"SGLang ended with 1:\nout of memory"):
            measure(Path("/m"), ["--fail"])

    def test_an_import_that_fails_does_not_hang(self, tmp_path: Path) -> None:
        measure = plan_error.Measurer("cpu", python=str(write_interpreter(tmp_path, broken=True)))
        with pytest.raises(RuntimeError, match=r"SGLang was not imported, .* with 1:\nno module named sglang"):
            measure(Path("/m"), [])


class TestVerdict:
    def test_everything_is_as_planned(self) -> None:
        assert plan_error.verdict([EXACT, EXACT], []) == (
            "verdict: PASS: weights and KV cache equal to the byte: 2 of 2"
        )

    def test_a_total_may_miss_by_the_larger_of_two(self) -> None:
        assert plan_error.verdict([ON_GPU], []) == (
            "verdict: PASS: weights and KV cache equal to the byte, totals within 3% or 150 MiB "
            "(largest miss 80.0 MiB): 1 of 1"
        )
        for true, good in ((3150 * MIB, True), (3151 * MIB, False), (2850 * MIB, True), (2849 * MIB, False)):
            assert replace(ON_GPU, total_true=true).is_good is good
        # 3 % of ten gigabytes is more than 150 MiB.
        assert replace(ON_GPU, total_plan=10_000 * MIB, total_true=10_300 * MIB).is_good

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"weights_true": 999}, "weights off by 1 B"),
            ({"kv_true": 2003}, "KV cache off by -3 B"),
            ({"total_true": 3500 * MIB}, "total off by -500.0 MiB"),
            ({"failure": "RuntimeError: no kernel"}, "failed at work: RuntimeError: no kernel"),
        ],
    )
    def test_what_is_off_is_named(self, change: dict[str, object], words: str) -> None:
        first, last = plan_error.verdict([ON_GPU, replace(ON_GPU, **change)], []).splitlines()
        assert first == f"off: llama at 512: {words}"
        assert last.startswith("verdict: FAIL: ")
        assert last.endswith(": 1 of 2")

    def test_what_was_not_measured_does_not_pass(self) -> None:
        first, last = plan_error.verdict([EXACT], ["qwen2 at 512: SGLang ended with -9"]).splitlines()
        assert first == "failed: qwen2 at 512: SGLang ended with -9"
        assert last == "verdict: FAIL: weights and KV cache equal to the byte: 1 of 2"
        assert plan_error.verdict([], []).startswith("verdict: FAIL")


class TestGpu:
    def test_without_one_it_says_so(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(sys, "argv", ["plan_error.py", "--device", "cuda"])
        assert plan_error.main() == 6
        assert capsys.readouterr().err == ("plan_error: no NVIDIA GPU is visible; run it where nvidia-smi lists one\n")

    def test_the_one_that_is_visible_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text('#!/bin/sh\n[ "$2" = 1 ] && echo "Tesla P4, 580.105.08, 7611, 3"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        gpu = plan_error.find_gpu()
        assert gpu == plan_error.Gpu("Tesla P4", "580.105.08", 7611 * MIB, 3 * MIB)
        assert plan_error.machine(gpu).startswith("Tesla P4, 7,611 MiB, driver 580.105.08; torch ")

    def test_where_the_memory_went_stands_beside_the_plan(self) -> None:
        text = plan_error.split_table([replace(ON_GPU, plan_parts={"weights": 1400 * MIB, "workspace": 0})])
        assert text.splitlines()[-1].split() == [
            *("llama", "512", "500.0", "0.0", "3,080.0", "2,500.0", "0.0", "580.0", "weights", "1,400.0")
        ]  # fmt: skip

    def test_rows_are_plain_values(self) -> None:
        assert json.loads(json.dumps(plan_error.asdict(ON_GPU)))["total_true"] == 3080 * MIB
