"""Sweeps over real processes: what is measured, what is kept, what is said when it cannot be."""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.errors import ExitCode
from support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Bench

    Start = Callable[..., Bench]
    Serve = Callable[..., str]

SHORT = ("--requests", 4, "--output-tokens", 8, "--prompt-tokens", 16)


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def test_a_running_server_is_measured_whole(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server(), tmp_path / "out"
    run = bench("batch", "--url", url, "--sizes", "1,4", "--repeats", 2, *SHORT, "--output", folder)
    assert run.finish() == ExitCode.OK, run.errors
    document = results(folder)
    assert document["complete"]
    assert [entry["name"] for entry in document["points"]] == ["batch 1", "batch 4"]
    requests = [request for entry in document["points"] for run in entry["runs"] for request in run["requests"]]
    assert len(requests) == 2 * 2 * 4
    assert {(request["error"], request["output_tokens"], len(request["itl"])) for request in requests} == {(None, 8, 7)}
    server_facts = document["instance"]["server"]
    assert (server_facts["engine"], server_facts["engine_version"], server_facts["model"]) == (
        "sglang",
        "0.5.23",
        "tiny",
    )
    assert document["machine"]["pascaline"]
    assert run.output.splitlines()[1].startswith("batch 1 ")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert run.errors.endswith(f"results {folder}/results.json\nreport  {folder}/report.html\n")


def test_an_instance_is_started_for_it_and_ended(bench: Start, instance_flags: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run = bench("batch", *instance_flags, "--sizes", "2", "--repeats", 1, *SHORT, "--output", folder)
    assert run.finish() == ExitCode.OK, run.errors
    document = results(folder)
    assert document["instance"]["start_seconds"] > 0
    assert document["instance"]["model"]["architecture"] == "llama"
    # The sweep's need, as the user chose nothing.
    assert document["instance"]["server"]["max_running_requests"] == 2
    assert document["plan"]["fits"]
    assert document["points"][0]["summary"]["host_memory_bytes"]["value"] > 0


def test_arrivals_are_measured_at_each_rate(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server(), tmp_path / "out"
    run = bench("serve", "--url", url, "--rates", "20,50", "--repeats", 1, *SHORT, "--output", folder, "--json")
    assert run.finish() == ExitCode.OK, run.errors
    assert json.loads(run.output) == results(folder)
    assert [entry["name"] for entry in results(folder)["points"]] == ["20 requests/s", "50 requests/s"]


def test_contexts_that_do_not_fit_are_skipped_with_the_reason(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server("", "--context-length", "512"), tmp_path / "out"
    arguments = ("--url", url, "--lengths", "256,1024", "--output-tokens", 8, "--requests", 2, "--repeats", 1)
    run = bench("context", *arguments, "--output", folder)
    assert run.finish() == ExitCode.FAILED
    first, second = results(folder)["points"]
    # A text of the density that was measured; the server counts its tokens.
    assert first["runs"][0]["requests"][0]["prompt_tokens"] == pytest.approx(256 - 8, rel=0.05)
    assert second["skipped"] == "needs a context of 1024 tokens, the server has 512"
    assert "context 1024  skipped: needs a context of 1024 tokens, the server has 512" in run.output


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow("repeats what SIGINT shows"))]
)
def test_an_interrupted_benchmark_keeps_what_it_has_and_goes_on(
    bench: Start, instance_flags: list[Any], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "out"
    arguments = ("batch", *instance_flags, "--sizes", "1", "--repeats", 2, "--requests", 8, "--prompt-tokens", 16)
    arguments = (*arguments, "--output-tokens", 64, "--output", folder)

    def runs() -> list[Any]:
        path = folder / "results.json"
        points = json.loads(path.read_text())["points"] if path.exists() else []
        found: list[Any] = points[0]["runs"] if points else []
        return found

    slow = "decode_tokens_per_second=100"
    first = bench(*arguments, FAKE_ENGINE_FAULTS=slow)
    wait_until("the first run", runs)
    assert first.interrupt(number) == ExitCode.INTERRUPTED
    kept = runs()
    assert len(kept) == 1
    assert not results(folder)["complete"]
    assert "interrupted; to continue: " in first.errors
    assert "Interrupted" in (folder / "report.html").read_text()

    second = bench(*arguments, FAKE_ENGINE_FAULTS=slow)
    assert second.finish() == ExitCode.OK, second.errors
    assert results(folder)["complete"]
    assert runs()[0] == kept[0]
    assert len(runs()) == 2


def test_a_complete_benchmark_is_not_measured_again(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server(), tmp_path / "out"
    arguments = ("batch", "--url", url, "--sizes", "1", "--repeats", 1, *SHORT, "--output", folder)
    assert bench(*arguments).finish() == ExitCode.OK
    before = results(folder)["points"]
    assert bench(*arguments).finish() == ExitCode.OK
    assert results(folder)["points"] == before


def test_a_server_that_dies_ends_the_benchmark_with_what_it_has(bench: Start, server: Serve, tmp_path: Path) -> None:
    """One request finds the length of prompts, one warms up, eight are measured; then it crashes."""
    url, folder = server("crash_after_requests=11"), tmp_path / "out"
    run = bench("batch", "--url", url, "--sizes", "1", "--repeats", 3, "--requests", 8, *SHORT[2:], "--output", folder)
    assert run.finish() == ExitCode.ENGINE_FAILED
    assert re.search(
        r"^pascaline bench: batch 1, run 2 of 3: no request succeeded; the first failed with: "
        r"(failed to connect to 127\.0\.0\.1:\d+: .*|the server closed the connection.*)$",
        run.errors.splitlines()[-1],
    )
    assert len(results(folder)["points"][0]["runs"]) == 1
    assert "interrupted; to continue: " in run.errors
    assert "Interrupted" in (folder / "report.html").read_text()


def test_settings_of_a_file_are_part_of_the_results(bench: Start, instance_flags: list[Any], tmp_path: Path) -> None:
    """And decide whether a folder may be continued, as flags do; the values of variables, which may be keys, are not."""
    folder, config = tmp_path / "out", tmp_path / "emily.toml"
    config.write_text('context_length = 512\nenvironment = { HF_TOKEN = "hf_secret" }\n')
    arguments = ("batch", *instance_flags, "--config", config, "--sizes", "1", "--repeats", 1, *SHORT)
    arguments = (*arguments, "--output", folder)
    assert bench(*arguments).finish() == ExitCode.OK
    settings = results(folder)["instance"]["settings"]
    assert (settings["context_length"], settings["environment"]) == ("512", "HF_TOKEN")
    assert "hf_secret" not in (folder / "results.json").read_text() + (folder / "report.html").read_text()
    config.write_text("context_length = 512\nradix_cache = false\n")
    run = bench(*arguments)
    assert run.finish() == ExitCode.CONFIGURATION
    assert "holds runs of another instance (settings given: " in run.errors.splitlines()[-1]


def test_runs_of_another_instance_are_not_mixed_in(bench: Start, server: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("--sizes", "1", "--repeats", 1, *SHORT, "--output", folder)
    assert bench("batch", "--url", server(), *arguments).finish() == ExitCode.OK
    before = (folder / "results.json").read_bytes()
    run = bench("batch", "--url", server("", "--context-length", "512"), *arguments)
    assert run.finish() == ExitCode.CONFIGURATION
    assert run.errors.splitlines()[-1] == (
        f"pascaline bench: --output: {folder} holds runs of another instance (context length: 8192, now 512); "
        "name another folder, or measure with the settings of those runs"
    )
    assert (folder / "results.json").read_bytes() == before


def test_a_server_that_refuses_everything_is_quoted(bench: Start, server: Serve, tmp_path: Path) -> None:
    url = server("error_status=500")
    run = bench("batch", "--url", url, "--sizes", "1", *SHORT, "--output", tmp_path / "out")
    assert run.finish() == ExitCode.MISSING
    assert run.errors.splitlines()[-1] == (
        f"pascaline bench: --url: {url} has no /tokenize and answered a completion with status 500 and no token count; "
        "one of the two is needed to make prompts of a known length"
    )


def test_an_answer_that_breaks_off_is_an_error_of_that_request(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server("cut_stream_after=5"), tmp_path / "out"
    arguments = ("--requests", 12, "--output-tokens", "1-8", "--prompt-tokens", 16, "--repeats", 1, "--sizes", "1")
    assert bench("batch", "--url", url, *arguments, "--output", folder).finish() == ExitCode.OK
    requests = results(folder)["points"][0]["runs"][0]["requests"]
    errors = {request["error"] for request in requests}
    assert errors == {None, "the server closed the connection in the middle of the answer"}
    assert 0 < results(folder)["points"][0]["summary"]["error_ratio"]["value"] < 1


def test_an_instance_that_cannot_start_is_reported_with_its_words(
    bench: Start, instance_flags: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    run = bench("batch", *instance_flags, "--output", folder, FAKE_ENGINE_FAULTS="load_error=out-of-memory")
    assert run.finish() == ExitCode.ENGINE_FAILED
    last = run.errors.splitlines()[-1]
    assert last.startswith(
        "pascaline bench: pascaline serve ended with exit code 5 (the engine failed while it loaded); its last line: "
    )
    assert "not enough memory on the device" in last
    assert last.endswith(f"the whole log: {folder}/serve.log")


def test_a_key_is_used_and_never_written_down(bench: Start, server: Serve, tmp_path: Path) -> None:
    url, folder = server("", "--api-key", "top-secret"), tmp_path / "out"
    key = tmp_path / "key"
    key.write_text("top-secret\n")
    arguments = ("batch", "--url", url, "--sizes", "1", "--repeats", 1, *SHORT)
    run = bench(*arguments, "--api-key-file", key, "--output", folder)
    assert run.finish() == ExitCode.OK, run.errors
    assert all("top-secret" not in path.read_text() for path in folder.iterdir())
    run = bench(*arguments, "--output", tmp_path / "other")
    assert run.finish() == ExitCode.MISSING
    assert run.errors.splitlines()[-1] == (
        f"pascaline bench: --url: {url}/v1/models answered with status 401, must be 200 and list a model; "
        "is this an OpenAI API, and does it need --api-key-file?"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "1,x"), "--sizes: must be whole numbers above 0 with commas between, got '1,x'"),
        (("--sizes", "0"), "--sizes: must be whole numbers above 0 with commas between, got '0'"),
        (("--sizes", "²"), "--sizes: must be whole numbers above 0 with commas between, got '²'"),
        (
            ("--sizes", "1,8", "--requests", "7"),
            "--requests: must be at least the largest of --sizes, which is 8, got 7",
        ),
        (("--repeats", "0"), "--repeats: must be between 1 and 1000, got 0"),
        (("--timeout", "0"), "--timeout: must be between 0.1 and 86400, got 0"),
        (
            ("--url", "http://h:1", "--threads", "2"),
            "--threads: cannot change the server of --url, must be left out",
        ),
        (("--port", "30000"), "--port: bench chooses free ports on loopback itself, must be left out"),
        (
            ("--prompt-tokens", "some"),
            "--prompt-tokens: must be like 128, 64-256, normal:128:32 or lognormal:128:0.5, got 'some'",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(bench: Start, arguments: tuple[str, ...], message: str) -> None:
    run = bench("batch", *arguments)
    assert run.finish() == ExitCode.CONFIGURATION
    assert run.errors == f"pascaline bench: {message}\n"


def test_a_server_that_is_not_there_is_named(bench: Start, tmp_path: Path) -> None:
    run = bench("batch", "--url", "http://127.0.0.1:1", "--output", tmp_path / "out")
    assert run.finish() == ExitCode.MISSING
    assert run.errors.splitlines()[-1] == (
        "pascaline bench: --url: failed to reach http://127.0.0.1:1: Connection refused; is the server up?"
    )


def test_results_are_shown_again_and_compared(bench: Start, server: Serve, tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder, speed in zip(folders, (100, 400), strict=True):
        url = server(f"decode_tokens_per_second={speed}")
        arguments = ("--url", url, "--sizes", "1", "--repeats", 3, "--requests", 2, "--output-tokens", 40)
        assert bench("batch", *arguments, "--output", folder).finish() == ExitCode.OK
    shown = bench("report", folders[0])
    assert shown.finish() == ExitCode.OK
    assert shown.output.splitlines()[1].startswith("batch 1")
    together = bench("report", *folders, "--page", tmp_path / "all.html")
    assert together.finish() == ExitCode.OK
    assert together.errors == f"report  {tmp_path / 'all.html'}\n"
    assert (tmp_path / "all.html").read_text().count("<h1>Batch sweep:") == 2
    compared = bench("compare", *folders, "--json")
    assert compared.finish() == ExitCode.OK
    rows = {row["figure"]: row for row in json.loads(compared.output)["rows"]}
    assert rows["itl_p50"]["verdict"] == "B is better"
    assert rows["itl_p50"]["ratio"] < 0.5
    text = bench("compare", *folders)
    assert text.finish() == ExitCode.OK
    assert "B is better" in text.output
