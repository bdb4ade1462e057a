"""What is read of the machine, of tools and of the card: with a faked /proc, driver and programs."""

from __future__ import annotations

import argparse
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.bench import llama_tools
from pascaline.bench.experiment import Experiment, batch_points
from pascaline.bench.instance import Instance, to_flags
from pascaline.bench.llama_tools import Scoring, check_space, reference_bytes, score, score_reference
from pascaline.bench.reference import Setting, find_card, reference, roofline
from pascaline.bench.sampling import ExporterGpu, LocalGpu, Sampler, family, host_memory_bytes
from pascaline.bench.stream import Endpoint
from pascaline.cards import load_card
from pascaline.cli.options import add_settings_arguments, load_from_arguments
from pascaline.engines.server import Server
from pascaline.errors import MissingError, PascalineError, StorageError
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment
from pascaline.models.gguf import read_gguf
from support.models import SHAPES, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


# --- memory of the engine ---------------------------------------------------------------------------------------------


def process(proc: Path, pid: int, children: str, total: int, shared: int) -> None:
    folder = proc / str(pid)
    (folder / "task" / str(pid)).mkdir(parents=True)
    (folder / "task" / str(pid) / "children").write_text(children)
    (folder / "statm").write_text(f"99999 {total} {shared} 1 0 1 0\n")


def test_memory_is_of_the_whole_family_and_shared_pages_count_once(tmp_path: Path) -> None:
    process(tmp_path, 10, "11 12 ", total=100, shared=40)
    process(tmp_path, 11, "13 ", total=60, shared=50)
    process(tmp_path, 12, "", total=30, shared=0)
    process(tmp_path, 13, "", total=5, shared=5)
    process(tmp_path, 99, "", total=1000, shared=0)
    assert family(10, tmp_path) == [10, 11, 13, 12]
    assert host_memory_bytes(family(10, tmp_path), tmp_path) == (60 + 10 + 30 + 0 + 50) * PAGE_BYTES


def test_a_process_that_is_gone_has_no_memory_rather_than_none_of_it(tmp_path: Path) -> None:
    assert family(None, tmp_path) == []
    assert host_memory_bytes(family(10, tmp_path), tmp_path) is None


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in fake_nvml_environment(DEMO_SCENARIO).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("two_cards")
def test_first_gpu_is_read_where_no_process_tells_which() -> None:
    gpu = LocalGpu()
    try:
        found = gpu.read([])
    finally:
        gpu.close()
    assert found.keys() == {"gpu_memory_bytes", "gpu_utilization_ratio", "power_watts"}
    assert 0 < found["gpu_memory_bytes"] <= load_card("tesla-p4").memory_bytes
    assert 0 <= found["gpu_utilization_ratio"] <= 1
    assert 0 < found["power_watts"] <= 75


@pytest.mark.usefixtures("two_cards")
def test_sampler_reads_until_it_is_left() -> None:
    gpu = LocalGpu()
    sampler = Sampler(gpu, os.getpid)
    try:
        with sampler:
            threading.Event().wait(0.6)
    finally:
        gpu.close()
    assert len(sampler.samples) >= 1
    assert all(sample.power_watts and sample.host_memory_bytes for sample in sampler.samples)


PAGE = """\
# TYPE nvidia_gpu_memory_used_bytes gauge
nvidia_gpu_memory_used_bytes{gpu="0",uuid="GPU-1"} 5.368709e+09
nvidia_gpu_utilization_gpu{gpu="0",uuid="GPU-1"} 87
nvidia_gpu_power_draw{gpu="0",uuid="GPU-1"} 61.5
"""


@pytest.fixture
def exporter() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    thread.join()
    server.server_close()


def test_exporter_page_of_another_host_is_read(exporter: str) -> None:
    assert ExporterGpu(exporter).read([]) == pytest.approx(
        {"gpu_memory_bytes": 5.368709e9, "gpu_utilization_ratio": 0.87, "power_watts": 61.5}
    )


def test_exporter_that_is_not_there_gives_nothing() -> None:
    assert ExporterGpu("http://127.0.0.1:1/metrics").read([]) == {}


# --- llama.cpp's tools ------------------------------------------------------------------------------------------------

REFERENCE_OUTPUT = """\
0.00.328 I perplexity: calculating perplexity over 2 chunks, n_ctx=512, batch_size=2048, n_seq=4
[1]17.9667,[2]23.2536,
0.14.936 I Final estimate: PPL = 23.2536 +/- 1.86435
"""
SCORE_OUTPUT = """\
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      18.5701 ±    3.1511       0.03303 ±    0.01945       0.05068 ±    0.00337     5.614 ±  0.551 %    85.098 ±  2.234 %
   2      24.9749 ±    3.0534       0.07141 ±    0.01745       0.05929 ±    0.00341     5.248 ±  0.425 %    84.118 ±  1.620 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  24.974900 ±   3.053400
Mean PPL(base)                :  23.253600 ±   1.864351
Mean PPL(Q)/PPL(base)         :   1.073907 ±   0.012199

====== KL divergence statistics ======
Mean    KLD:   0.059290 ±   0.003410
Maximum KLD:   0.936081
99.0%   KLD:   0.324901
Median  KLD:   0.038971

====== Token probability statistics ======
Same top p: 84.118 ± 1.620 %
"""


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    return Scoring(text=tmp_path / "text.txt", chunks=2, on_gpu=False, threads=1)


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put a program in llama-perplexity's place; it keeps its arguments."""
    program = folder / "bin" / "llama-perplexity"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/arguments\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return folder / "arguments"


def test_reference_is_scored_and_its_progress_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Scoring
) -> None:
    arguments = tool(tmp_path, monkeypatch, f"cat <<'END'\n{REFERENCE_OUTPUT}END")
    chunks: list[int] = []
    found = score_reference(tmp_path / "f16.gguf", scoring, tmp_path / "base", chunks.append)
    assert found == {"perplexity": 23.2536, "perplexity_error": 1.86435}
    assert chunks[-1] == 2
    assert arguments.read_text().split() == [
        *("--model", f"{tmp_path}/f16.gguf", "--file", f"{tmp_path}/text.txt", "--ctx-size", "512"),
        *("--chunks", "2", "--threads", "1", "--n-gpu-layers", "0", "--kl-divergence-base", f"{tmp_path}/base"),
    ]


def test_a_type_is_scored_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Scoring
) -> None:
    tool(tmp_path, monkeypatch, f"cat <<'END'\n{SCORE_OUTPUT}END")
    chunks: list[int] = []
    assert score(tmp_path / "q4.gguf", scoring, tmp_path / "base", chunks.append) == pytest.approx(
        {
            "perplexity": 24.9749,
            "perplexity_error": 3.0534,
            "perplexity_ratio": 1.073907,
            "kl_mean": 0.05929,
            "kl_mean_error": 0.00341,
            "kl_p99": 0.324901,
            "same_top": 0.84118,
        }
    )
    assert chunks[-1] == 2


def test_a_tool_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Scoring) -> None:
    tool(tmp_path, monkeypatch, "echo loading\necho 'error: out of memory' >&2\nexit 3")
    with pytest.raises(PascalineError) as caught:
        score_reference(tmp_path / "f16.gguf", scoring, tmp_path / "base", lambda _: None)
    assert str(caught.value) == (
        f"llama-perplexity ended with exit code 3 for {tmp_path}/f16.gguf; "
        "its last lines: loading | error: out of memory"
    )


def test_output_without_the_figures_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Scoring
) -> None:
    tool(tmp_path, monkeypatch, "echo 'Mean PPL(Q) : 3.5 ± 0.1'")
    with pytest.raises(PascalineError) as caught:
        score(tmp_path / "q4.gguf", scoring, tmp_path / "base", lambda _: None)
    assert str(caught.value) == (
        "llama-perplexity: no kl_mean, kl_mean_error, kl_p99, perplexity_ratio, same_top "
        f"for {tmp_path}/q4.gguf; its last lines: Mean PPL(Q) : 3.5 ± 0.1"
    )


def test_a_tool_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scoring: Scoring) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError) as caught:
        score(tmp_path / "q4.gguf", scoring, tmp_path / "base", lambda _: None)
    assert str(caught.value) == (
        "llama-perplexity is not on PATH; install llama.cpp (Debian: llama.cpp-tools and llama.cpp-tools-extra, "
        "Nix: llama-cpp), or name it with --tools"
    )


def test_reference_file_has_the_size_that_was_measured() -> None:
    """llama.cpp 0.7.0, 4 chunks of a model with 49,152 tokens: 100,286,452 bytes."""
    assert reference_bytes(4, 49152) == pytest.approx(100_286_452, rel=0.01)


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=rf"^{tmp_path}: scores needs 1024.00 GiB, [0-9.]+ GiB are free; name another"
    ):
        check_space(tmp_path, 2**40, "scores")
    assert llama_tools.WINDOW_TOKENS == 512


# --- settings for the instance ----------------------------------------------------------------------------------------


def test_settings_reach_the_instance_as_they_were_given() -> None:
    values = {
        "model": "a b.gguf",
        "radix_cache": False,
        "mem_fraction_static": 0.8,
        "kv_cache.max_tokens": 100,
        "extra_args": ("--x", "--y=1"),
        "environment": {"A": "1", "B": "c d"},
        "context_length": 64,
    }
    parser = argparse.ArgumentParser()
    add_settings_arguments(parser)
    settings = load_from_arguments(parser.parse_args([*to_flags(values), "--device", "cpu"])).settings
    assert (settings.model, settings.radix_cache, settings.mem_fraction_static) == ("a b.gguf", False, 0.8)
    assert settings.kv_cache.max_tokens == 100
    assert (settings.extra_args, settings.environment) == (("--x", "--y=1"), {"A": "1", "B": "c d"})


# --- theory -----------------------------------------------------------------------------------------------------------

SETTING = Setting(engine="sglang", dtype="float16", kv_dtype="fp16", chunked_prefill_tokens=512)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Llama 2 7B in Q4_K_M, sparse."""
    path = tmp_path_factory.mktemp("model") / "7b.gguf"
    return read_gguf(write_gguf(path, SHAPES["llama-2-7b"], "Q4_K_M", sparse=True))


def test_roofline_of_one_request_is_bandwidth_over_bytes(seven_billion: ModelSpec) -> None:
    """A short prompt and answer read hardly more than the weights: 192 GB/s over 4.0 GB, 48 tokens a second."""
    found = roofline(load_card("tesla-p4"), seven_billion, SETTING, 1, 1, 2)
    assert found == pytest.approx(192e9 / seven_billion.weights_bytes, rel=0.05)


def test_roofline_rises_with_the_batch_and_falls_with_the_context(seven_billion: ModelSpec) -> None:
    card = load_card("tesla-p4")
    by_batch = [roofline(card, seven_billion, SETTING, batch, 128, 128) for batch in (1, 2, 4, 8, 16)]
    assert by_batch == sorted(by_batch)
    by_context = [roofline(card, seven_billion, SETTING, 1, prompt, 64) for prompt in (64, 1024, 4032)]
    assert by_context == sorted(by_context, reverse=True)


def test_the_plan_expects_less_than_the_roofline_and_more_than_the_guide(seven_billion: ModelSpec) -> None:
    experiment = Experiment(
        kind="batch", points=batch_points([1, 2, 4, 8], "128", "128", None), repeats=1, seed=1, timeout=1.0
    )
    found = reference(load_card("tesla-p4"), seven_billion, None, "sglang", experiment)
    assert found["note"] is None
    for point, claimed in zip(found["points"].values(), (3, 5, 8, 10), strict=True):
        plan, limit = point["plan"]["output_throughput"], point["roofline"]["output_throughput"]
        assert claimed < plan < limit
        assert 3.5e9 < point["plan"]["gpu_memory_bytes"] < 8e9


def test_without_card_or_model_the_report_says_what_is_missing(seven_billion: ModelSpec) -> None:
    experiment = Experiment(kind="batch", points=batch_points([1], "8", "8", 1), repeats=1, seed=1, timeout=1.0)
    for card, spec, note in (
        (None, seven_billion, "no roofline: the server runs on the CPU, or its card is unknown (name it with --card)"),
        (
            load_card("cpu"),
            seven_billion,
            "no roofline: the server runs on the CPU, or its card is unknown (name it with --card)",
        ),
        (load_card("tesla-p4"), None, "no roofline: the model's file is not on this machine (name it with --model)"),
    ):
        assert reference(card, spec, None, "sglang", experiment)["note"] == note


def test_card_is_known_by_profile_or_by_the_drivers_name() -> None:
    for card in (find_card("tesla-p4", []), find_card(None, ["Tesla P4"]), find_card(None, ["NVIDIA Tesla P4"])):
        assert card is not None
        assert card.name == "tesla-p4"
    assert find_card(None, []) is None
    assert find_card(None, ["Tesla V100"]) is None


def test_the_card_is_the_one_that_the_instance_was_planned_for() -> None:
    """Of a host with unlike cards the first need not be the instance's."""
    card = find_card(None, ["Tesla P4", "Tesla P40"], {"card": "tesla-p40"})
    assert card is not None
    assert card.name == "tesla-p40"
    named = find_card("tesla-p4", [], {"card": "tesla-p40"})
    assert named is not None
    assert named.name == "tesla-p4"
    assert find_card(None, [], {"card": "Tesla V100"}) is None


# --- which GPU belongs to an instance ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "device", "exporter", "source"),
    [
        ("http://127.0.0.1:1", "cuda", None, LocalGpu),
        ("http://127.0.0.1:1", None, None, LocalGpu),
        ("http://127.0.0.1:1", "cpu", None, None),
        ("http://10.0.0.1:1", "cuda", None, ExporterGpu),
        ("http://127.0.0.1:1", "cuda", "http://127.0.0.1:9836/metrics", ExporterGpu),
    ],
)
def test_gpu_is_read_where_the_engine_runs(
    url: str, device: str | None, exporter: str | None, source: type | None
) -> None:
    """An engine on the CPU has no GPU, even where its host has one."""
    server = Server(model="m", engine="sglang", settings={"device": device} if device else None)
    with Instance(Endpoint(url), server, None).gpu(exporter) as gpu:
        assert (None if gpu is None else type(gpu)) is source
