"""The main job, end to end: `pascaline serve` with the real SGLang and the built-in model on the CPU."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pascaline.errors import ExitCode
from pascaline.models.resolve import builtin_model
from pascaline.plugin import PLUGIN
from support.instance import Answer, Instance, running, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine

START_SECONDS = 400
"""A start takes 30 s on two idle cores; on a machine under load many times that."""
REQUEST_SECONDS = 300
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, **changes: Any) -> dict[str, Any]:
    """The built-in model with a small pool; patience as by default, but for what a killed scheduler costs."""
    small = {"device": "cpu", "context_length": 2048, "max_running_requests": 8, "chunked_prefill_tokens": 128}
    patient = {"drain_timeout": REQUEST_SECONDS, "start_timeout": START_SECONDS, "stall_timeout": 120}
    return {"cache_dir": cache, **small, **patient, **changes}


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Instance]:
    """One instance for all tests, in the order in which they stand: the last two end its engine and itself."""
    with running(tmp_path_factory.mktemp("sglang"), **settings(cache)) as started:
        started.wait_for_state("ready", seconds=START_SECONDS)
        yield started


def ask(instance: Instance, **options: Any) -> Answer:
    question = {"model": "SmolLM2-135M-Instruct", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
    return instance.api("/v1/chat/completions", question | options, timeout=REQUEST_SECONDS)


class TestServing:
    def test_a_chat(self, instance: Instance) -> None:
        [choice] = ask(instance).json["choices"]
        assert choice["message"]["content"] == ANSWER
        assert choice["finish_reason"] == "stop"

    def test_a_stream_arrives_piece_by_piece(self, instance: Instance) -> None:
        body = {
            "model": "SmolLM2-135M-Instruct",
            "messages": QUESTION,
            "max_tokens": 16,
            "temperature": 0,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{instance.api_url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        events = []
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            events = [line[6:].decode().strip() for line in answer if line.startswith(b"data: ")]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
        assert "".join(deltas) == ANSWER
        assert len([delta for delta in deltas if delta]) >= 5

    def test_eight_at_once(self, instance: Instance) -> None:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(instance), range(8)))
        assert {answer.json["choices"][0]["message"]["content"] for answer in answers} == {ANSWER}

    def test_a_prompt_beyond_the_context(self, instance: Instance) -> None:
        answer = ask(instance, messages=[{"role": "user", "content": "word " * 3000}])
        assert answer.status == 400
        assert "2048" in answer.text

    def test_health(self, instance: Instance) -> None:
        report = instance.wait_for_state("ready", seconds=REQUEST_SECONDS)
        assert report["versions"]["sglang"] == PLUGIN.sglang[-1]
        assert report["model"]["name"] == "SmolLM2-135M-Instruct"
        assert report["restarts"] == 0
        assert instance.agent("/readyz").status == 200

    def test_metrics_of_both(self, instance: Instance) -> None:
        assert instance.metric("pascaline_engine_up") == 1
        for stage in ("resolve", "verify", "load", "warm-up"):
            assert instance.metric(f'pascaline_time_to_ready_seconds{{stage="{stage}"}}') >= 0
        page = instance.api("/metrics").text
        for name in ("realtime_tokens_total", "num_running_reqs", "time_to_first_token_seconds_bucket"):
            assert f"sglang:{name}" in page

    def test_the_plan_is_in_force(self, instance: Instance) -> None:
        plan = instance.agent("/plan").json
        page = instance.api("/metrics").text
        [pool] = [line for line in page.splitlines() if line.startswith("sglang:max_total_num_tokens{")]
        assert float(pool.rpartition(" ")[2]) == plan["kv_tokens"]
        [model] = instance.api("/v1/models").json["data"]
        assert (model["id"], model["max_model_len"]) == ("SmolLM2-135M-Instruct", 2048)


@pytest.mark.slow("ends and restarts a real engine")
class TestEnds:
    def test_a_killed_scheduler_is_replaced(self, instance: Instance) -> None:
        [scheduler] = [each for each in instance.descendants() if each.name().startswith("sglang::sched")]
        scheduler.kill()
        instance.wait_for_state("restarting")
        assert instance.agent("/readyz").status == 503
        report = instance.wait_for_state("ready", seconds=START_SECONDS)
        assert report["restarts"] == 1
        assert instance.metric('pascaline_engine_restarts_total{reason="crash"}') == 1
        assert ask(instance).json["choices"][0]["message"]["content"] == ANSWER

    def test_sigterm_lets_a_request_in_flight_complete(self, instance: Instance) -> None:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, instance, max_tokens=60, ignore_eos=True)
            instance.wait_for_state("busy")
            instance.process.send_signal(signal.SIGTERM)
            instance.wait_for_state("draining")
            assert instance.agent("/readyz").status == 503
            wait_until("new work is refused", lambda: ask(instance, max_tokens=1).status == 503)
            headers = {name.lower(): value for name, value in ask(instance, max_tokens=1).headers.items()}
            assert (headers["retry-after"], headers["connection"]) == ("5", "close")
            assert answer.result().json["usage"]["completion_tokens"] == 60
        assert instance.wait(REQUEST_SECONDS) == ExitCode.OK
        assert instance.descendants() == []
        assert "Traceback" not in instance.text


@pytest.mark.slow("starts a real engine of its own")
def test_a_hugging_face_folder_and_an_api_key(tmp_path: Path, cache: Path) -> None:
    """The same model as configuration, tokenizer and safetensors, which SGLang's own loader reads."""
    folder, key = hugging_face_folder(tmp_path / "emily"), tmp_path / "key"
    key.write_text("sesame\n")
    with running(tmp_path, **settings(cache, model=folder, api_key_file=key)) as instance:
        report = instance.wait_for_state("ready", seconds=START_SECONDS)
        assert report["model"] == {"name": "emily", "path": str(folder), "architecture": "llama", "sha256": None}
        body = {"model": "emily", "messages": QUESTION, "max_tokens": 16, "temperature": 0}
        assert instance.api("/v1/chat/completions", body).status == 401
        headers = {"Authorization": "Bearer sesame"}
        answer = instance.api("/v1/chat/completions", body, headers=headers, timeout=REQUEST_SECONDS)
        assert answer.json["choices"][0]["message"]["content"] == ANSWER
        assert instance.stop(seconds=REQUEST_SECONDS) == ExitCode.OK


def hugging_face_folder(folder: Path) -> Path:
    """The built-in model as it would be downloaded from Hugging Face."""
    import torch
    from safetensors.torch import save_file
    from sglang_pascal.checkpoint.dequantize import dequantized
    from sglang_pascal.checkpoint.gguf_file import GgufFile
    from sglang_pascal.checkpoint.prepare import MANIFEST, prepare
    from sglang_pascal.checkpoint.weights import raw_tensors

    prepare(builtin_model(), folder)
    (folder / MANIFEST).unlink()
    tensors = {
        name: value.contiguous() for name, value in dequantized(raw_tensors(GgufFile(builtin_model())), torch.bfloat16)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow("starts a real engine of its own")
def test_nothing_is_left_when_the_supervisor_is_killed_while_it_loads(tmp_path: Path, cache: Path) -> None:
    with running(tmp_path, **settings(cache)) as instance:
        wait_until("SGLang's processes", lambda: len(instance.descendants()) >= 3, seconds=START_SECONDS)
        instance.process.kill()
        instance.wait()
        wait_until("no process is left", lambda: instance.command_lines() == [])


@pytest.mark.slow("starts a real engine of its own")
def test_a_second_signal_ends_at_once_while_it_loads(tmp_path: Path, cache: Path) -> None:
    with running(tmp_path, **settings(cache)) as instance:
        wait_until("SGLang's processes", lambda: len(instance.descendants()) >= 3, seconds=START_SECONDS)
        instance.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert instance.stop(signal.SIGINT, seconds=30) == ExitCode.INTERRUPTED
        assert [each for each in instance.descendants() if each.status() != psutil.STATUS_ZOMBIE] == []
