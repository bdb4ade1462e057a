"""`bench quant` whole on the CPU with the embedded model and llama.cpp's real tools."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from pascaline.bench.quant import DEFAULT_TYPES, default_types
from pascaline.errors import ExitCode
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment
from pascaline.models.resolve import builtin_model
from pascaline.settings import Settings
from support.hf_models import write_folder
from support.instance import FAKE_ENGINE, wait_until
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Bench

    Start = Callable[..., Bench]

TOOLS = ("llama-quantize", "llama-perplexity", "llama-server")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.slow("makes, scores and serves files of several types")
@pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)} (llama.cpp)")
def test_types_are_made_scored_and_served(bench: Start, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run = bench(
        *("quant", "--engine", "llama.cpp", "--types", "F16,Q8_0,Q4_K_M,NF4", "--chunks", 1, "--sizes", "1,2"),
        *(
            "--requests",
            2,
            "--prompt-tokens",
            8,
            "--output-tokens",
            4,
            "--repeats",
            1,
            "--cache-dir",
            tmp_path / "cache",
        ),
        *("--context-length", 512, "--output", folder),
    )
    assert run.finish(seconds=500) == ExitCode.OK, run.errors
    document = json.loads((folder / "results.json").read_text())
    types = {entry["name"]: entry for entry in document["types"]}
    f16, q8, q4, nf4 = (types[name] for name in ("F16", "Q8_0", "Q4_K_M", "NF4"))

    assert f16["file_bytes"] > q8["file_bytes"] > q4["file_bytes"] > 50e6
    assert f16["bits_per_weight"] == pytest.approx(16, abs=0.1)
    assert q8["bits_per_weight"] == pytest.approx(8.5, abs=0.1)
    assert abs(f16["kl_mean"]) < 1e-3 < q8["kl_mean"] * 10 < q4["kl_mean"]
    assert f16["same_top"] > q8["same_top"] > q4["same_top"] > 0.5
    assert f16["perplexity"] < q4["perplexity"]
    assert all(each["planned_bytes"] > 0 and each["memory_bytes"] > each["weights_bytes"] for each in (f16, q8, q4))
    assert nf4["skipped"].startswith("bitsandbytes quantises a Hugging Face folder in SGLang")

    names = [f"{name} batch {size}" for name in ("F16", "Q8_0", "Q4_K_M") for size in (1, 2)]
    assert [entry["name"] for entry in document["points"]] == names
    assert all(entry["summary"]["output_throughput"]["value"] > 0 for entry in document["points"])
    assert "The source is Q4_1 already" in document["quality_note"]
    assert "KL divergence from the highest precision" in (folder / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.json", "serve.log"]


@pytest.mark.slow("makes, scores and serves files of several types")
@pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)} (llama.cpp)")
def test_the_users_own_file_is_measured_where_it_is_and_stays(bench: Start, tmp_path: Path) -> None:
    """A Q4_1 file asked for as Q4_1 is not made again, and what is done is not done again by a second call."""
    own, folder = tmp_path / "own.gguf", tmp_path / "out"
    shutil.copy(builtin_model(), own)
    arguments = (
        *("quant", "--engine", "llama.cpp", "--model", own, "--types", "Q4_1", "--chunks", 1, "--sizes", "1"),
        *("--requests", 1, "--prompt-tokens", 8, "--output-tokens", 4, "--repeats", 1, "--context-length", 512),
        *("--cache-dir", tmp_path / "cache", "--output", folder),
    )
    first = bench(*arguments)
    assert first.finish(seconds=500) == ExitCode.OK, first.errors
    document = json.loads((folder / "results.json").read_text())
    assert own.stat().st_size == document["types"][0]["file_bytes"] == builtin_model().stat().st_size
    # The reference is the same weights in F16.
    assert abs(document["types"][0]["kl_mean"]) < 0.01
    second = bench(*arguments)
    assert second.finish() == ExitCode.OK, second.errors
    again = json.loads((folder / "results.json").read_text())
    assert (again["types"], again["points"]) == (document["types"], document["points"])
    assert "perplexity" not in second.errors


def test_tools_that_are_missing_are_told_before_any_work(bench: Start, tmp_path: Path) -> None:
    """llama-quantize is not enough: without llama-perplexity nothing would be scored."""
    tools, folder = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    (tools / "llama-quantize").write_text("#!/bin/sh\nexit 1\n")
    (tools / "llama-quantize").chmod(0o755)
    run = bench("quant", "--tools", tools, "--output", folder, PATH=str(tmp_path))
    assert run.finish() == ExitCode.MISSING
    assert run.errors == (
        f"pascaline bench: llama-perplexity is not in {tools} or on PATH; install llama.cpp (Debian: llama.cpp-tools and "
        "llama.cpp-tools-extra, Nix: llama-cpp), or name it with --tools\n"
    )
    assert [path.name for path in folder.iterdir()] == []


def test_an_interruption_while_quality_is_measured_tells_how_to_go_on(bench: Start, tmp_path: Path) -> None:
    """Files and scores take minutes before the first result, so the folder's name is printed if nobody chose it."""
    tools, began = tmp_path / "bin", tmp_path / "began"
    tools.mkdir()
    for name in ("llama-quantize", "llama-perplexity"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {began}\nexec sleep 300\n")
        (tools / name).chmod(0o755)
    model = write_gguf(tmp_path / "emily.gguf", tiny("llama"), "F16")
    run = bench("quant", "--model", model, "--types", "F16", "--chunks", "1", "--tools", tools)
    wait_until("the scores", began.exists)
    assert run.interrupt() == ExitCode.INTERRUPTED
    (folder,) = tmp_path.glob("bench-quant-*")
    told = run.errors.splitlines()[-1]
    assert told.startswith("interrupted; to continue: pascaline bench quant --model ")
    assert told.endswith(f" --output {folder.name}")
    assert json.loads((folder / "results.json").read_text())["complete"] is False


def test_a_disk_that_is_too_small_is_told_before_a_file_is_made(bench: Start, tmp_path: Path) -> None:
    """The F16 file of a 7B alone takes minutes; its probabilities would not fit beside it."""
    tools, folder, made = tmp_path / "bin", tmp_path / "out", tmp_path / "made"
    tools.mkdir()
    for name in ("llama-quantize", "llama-perplexity"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {made}\nexit 1\n")
        (tools / name).chmod(0o755)
    (tools / "sitecustomize.py").write_text(
        "import shutil, types\nshutil.disk_usage = lambda folder: types.SimpleNamespace(free=2**28)\n"
    )
    run = bench("quant", "--types", "Q8_0", "--chunks", 1, "--tools", tools, "--output", folder, PYTHONPATH=str(tools))
    assert run.finish() == ExitCode.STORAGE
    assert run.errors == (
        f"pascaline bench: {folder}: measuring quality needs 0.27 GiB, 0.25 GiB are free; "
        "name another disk with --output, or measure fewer chunks with --chunks\n"
    )
    assert not made.exists()


def test_nf4_is_among_the_types_of_a_hugging_face_folder(tmp_path: Path) -> None:
    for model, engine, expected in (
        (str(tmp_path), "sglang", (*DEFAULT_TYPES, "NF4")),
        (str(tmp_path), "llama.cpp", DEFAULT_TYPES),
        (str(tmp_path / "emily.gguf"), "sglang", DEFAULT_TYPES),
    ):
        assert default_types(Settings(model=model, engine=engine)) == expected


def test_nf4_without_its_package_is_skipped_with_the_command_that_brings_it(bench: Start, tmp_path: Path) -> None:
    """On a host with a GPU, as its driver says; the engine's Python has no bitsandbytes."""
    model, folder = write_folder(tmp_path / "emily", tiny("llama")), tmp_path / "out"
    arguments = ("quant", "--model", model, "--types", "NF4", "--engine-executable", FAKE_ENGINE, "--output", folder)
    arguments = (*arguments, "--device", "cuda")
    run = bench(*arguments, CUDA_VISIBLE_DEVICES="0", **fake_nvml_environment(DEMO_SCENARIO))
    assert run.finish() == ExitCode.OK, run.errors
    (nf4,) = json.loads((folder / "results.json").read_text())["types"]
    assert nf4["skipped"] == (
        f"SGLang needs a package that is missing: {FAKE_ENGINE} -m pip install --no-deps bitsandbytes==0.49.2"
    )
    assert f"NF4: skipped: {nf4['skipped']}" in run.errors


def test_lengths_that_make_no_sense_are_refused_before_any_work(bench: Start, tmp_path: Path) -> None:
    run = bench("quant", "--prompt-tokens", "some", "--output", tmp_path / "out")
    assert run.finish() == ExitCode.CONFIGURATION
    assert run.errors == (
        "pascaline bench: --prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got 'some'\n"
    )


def test_types_that_are_not_known_are_refused(bench: Start) -> None:
    run = bench("quant", "--types", "F16,Q5_X")
    assert run.finish() == ExitCode.CONFIGURATION
    assert run.errors == (
        "pascaline bench: --types: unknown type 'Q5_X', must be one of: F16, NF4, Q2_K, Q3_K_L, Q3_K_M, Q3_K_S, Q4_0, Q4_1, "
        "Q4_K_M, Q4_K_S, Q5_0, Q5_1, Q5_K_M, Q5_K_S, Q6_K, Q8_0\n"
    )


def test_a_comparison_of_types_needs_instances_of_its_own(bench: Start) -> None:
    run = bench("quant", "--url", "http://127.0.0.1:30000")
    assert run.finish() == ExitCode.CONFIGURATION
    assert run.errors == "pascaline bench: --url: bench quant starts an instance for each type, must be left out\n"


@pytest.mark.engine
@pytest.mark.slow("starts a real engine of its own")
@pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)} (llama.cpp)")
def test_sglang_serves_the_quality_that_llama_cpp_measures(bench: Start, tmp_path: Path) -> None:
    """Two engines, one file, one text: their perplexities differ by the windows' first token and by rounding."""
    folder = tmp_path / "out"
    run = bench(
        *("quant", "--types", "Q8_0", "--chunks", 1, "--sizes", "1", "--requests", 2, "--prompt-tokens", 8),
        *("--output-tokens", 4, "--repeats", 1, "--cache-dir", tmp_path / "cache", "--output", folder),
    )
    assert run.finish(seconds=550) == ExitCode.OK, run.errors
    document = json.loads((folder / "results.json").read_text())
    (entry,) = document["types"]
    assert entry["served_perplexity"] == pytest.approx(entry["perplexity"], rel=0.05)
    point = document["points"][0]
    assert point["summary"]["error_ratio"]["value"] == 0
    assert {request["output_tokens"] for request in point["runs"][0]["requests"]} == {4}
    assert {request["prompt_tokens"] for request in point["runs"][0]["requests"]} == {8}
