"""The second engine for real: llama-server with the built-in model behind the same supervisor."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pascaline.engines.llama_cpp import LlamaCppEngine
from pascaline.errors import ExitCode
from pascaline.models.resolve import builtin_model
from pascaline.serving.engine_api import POLL_TIMEOUT_SECONDS
from support.instance import Instance, running, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    shutil.which("llama-server") is None, reason="llama-server is not on PATH (Debian: llama.cpp-tools)"
)
STORY_SECONDS = 4.0
"""Of a request that must still run when the supervisor looks, which it does once a second."""
MOST_STORY_TOKENS = 1000
"""Less than the context."""
# Its quantised activations answer the chat question in French; the plain sentence they complete.
SENTENCE = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
STORY = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("llama")
    with running(folder, **_settings(model=builtin_model())) as started:
        started.wait_for_state("ready")
        yield started
        assert started.stop() == ExitCode.OK


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """An instance that a test may spoil, of a shorter context, which starts in a second."""
    with running(tmp_path, **_settings(model=builtin_model(), context_length=1024)) as started:
        started.wait_for_state("ready")
        yield lambda: started


def _settings(**changes: Any) -> dict[str, Any]:
    # One thread: those of llama-server spin, and would hold the cores that other tests need.
    impatient = {"probe_interval": 2, "stall_timeout": 60, "drain_timeout": 300, "threads": 1}
    return {"engine": "llama.cpp", "device": "cpu", "context_length": 2048, **impatient, **changes}


def story(instance: Instance, **options: Any) -> dict[str, Any]:
    """A request that takes STORY_SECONDS at the speed that this machine has now; options: of the requests."""
    timings = instance.api("/v1/completions", STORY, timeout=300, **options).json["timings"]
    n_tokens = round(STORY_SECONDS * timings["predicted_per_second"])
    return STORY | {"max_tokens": max(STORY["max_tokens"], min(n_tokens, MOST_STORY_TOKENS))}


def test_every_argument_is_one_that_it_knows() -> None:
    """No argument of ours is unknown to it, and no other spelling of one gets past the check."""
    text = subprocess.run(["llama-server", "--help"], capture_output=True, text=True, check=True).stdout
    spec = re.compile(r"^(-[\w-]+(?:, +-[\w-]+)*)", re.MULTILINE)
    options = [set(re.split(", +", found)) for found in spec.findall(text)]
    flags = set(LlamaCppEngine.setting_flags)
    # An older build has these instead of --load-mode.
    replaced = {"--mlock", "--no-mmap"} if "--load-mode" in text else {"-lm", "--load-mode"}
    for flag in flags - replaced:
        [spellings] = [each for each in options if flag in each]
        assert spellings <= flags, flag


def test_it_completes(instance: Instance) -> None:
    assert instance.api("/v1/completions", SENTENCE).json["choices"][0]["text"].startswith(" Paris")


def test_it_streams_a_chat(instance: Instance) -> None:
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
    answer = instance.api("/v1/chat/completions", question | {"stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert len([choice for choice in choices if choice["delta"].get("content")]) > 1
    assert choices[-1]["finish_reason"] in {"length", "stop"}


def test_eight_at_once(instance: Instance) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: instance.api("/v1/completions", SENTENCE, timeout=300), range(8)))
    assert all(answer.json["choices"][0]["text"].startswith(" Paris") for answer in answers)


def test_health_and_metrics_of_both(instance: Instance) -> None:
    report = instance.health()
    assert (report["engine"], report["model"]["architecture"]) == ("llama.cpp", "llama")
    assert report["versions"]["llama.cpp"]
    assert instance.metric("pascaline_engine_up") == 1
    assert "llamacpp:tokens_predicted_total" in instance.api("/metrics").text


@pytest.mark.slow("keeps a real engine busy for long")
def test_it_is_busy_while_it_computes(instance: Instance) -> None:
    asked = story(instance)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(instance.api, "/v1/completions", asked, timeout=300)
        instance.wait_for_state("busy")
        assert answer.result().status == 200
    instance.wait_for_state("ready")


def test_the_context_is_the_one_that_was_asked_for(instance: Instance) -> None:
    answer = instance.api("/v1/completions", {"prompt": "word " * 2100, "max_tokens": 1})
    assert answer.status == 400
    assert "context" in answer.json["error"]["message"]


def test_sigterm_lets_a_request_in_flight_complete(own: Callable[..., Instance]) -> None:
    """llama-server itself drops requests at SIGTERM: the supervisor waits for them before it sends one."""
    instance = own()
    asked = story(instance)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(instance.api, "/v1/completions", asked, timeout=300)
        instance.wait_for_state("busy")
        instance.process.send_signal(signal.SIGTERM)
        assert answer.result().json["usage"]["completion_tokens"] == asked["max_tokens"]
    assert instance.wait() == ExitCode.OK
    assert instance.states[-2:] == ["draining", "stopped"]


@pytest.mark.slow("keeps a real engine busy for long")
def test_an_engine_that_is_too_busy_to_answer_is_waited_for(own: Callable[..., Instance]) -> None:
    """llama-server reports its requests between two batches only, and a batch may take longer than any time limit."""
    instance = own()
    asked = STORY | {"max_tokens": 600}  # no request before it, whose "busy" could be taken for this one's
    engine = psutil.Process(instance.health()["engine_pid"])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(instance.api, "/v1/completions", asked, timeout=300)
        instance.wait_for_state("busy")
        engine.suspend()
        instance.process.send_signal(signal.SIGTERM)
        time.sleep(POLL_TIMEOUT_SECONDS + 2)
        engine.resume()
        assert answer.result().json["usage"]["completion_tokens"] == asked["max_tokens"]
    assert instance.wait() == ExitCode.OK


@pytest.mark.slow("keeps a real engine busy for long")
def test_a_request_that_no_count_shows_yet_is_waited_for(own: Callable[..., Instance]) -> None:
    """It reached the engine before SIGTERM, and the first answer after that says that nothing runs."""
    instance = own()
    engine = psutil.Process(instance.health()["engine_pid"])
    asked = STORY | {"max_tokens": 200}
    with ThreadPoolExecutor(1) as pool:
        engine.suspend()
        answer = pool.submit(instance.api, "/v1/completions", asked, timeout=300)
        time.sleep(1)
        instance.process.send_signal(signal.SIGTERM)
        instance.wait_for_state("draining")
        engine.resume()
        assert answer.result().json["usage"]["completion_tokens"] == asked["max_tokens"]
    assert instance.wait() == ExitCode.OK


def test_a_second_signal_ends_at_once_one_that_does_not_answer(own: Callable[..., Instance]) -> None:
    instance = own()
    psutil.Process(instance.health()["engine_pid"]).suspend()
    instance.process.send_signal(signal.SIGINT)
    instance.wait_for_state("draining")
    assert instance.stop(signal.SIGINT, seconds=POLL_TIMEOUT_SECONDS - 2) == ExitCode.INTERRUPTED


def test_a_killed_engine_comes_back(own: Callable[..., Instance]) -> None:
    instance = own()
    psutil.Process(instance.health()["engine_pid"]).kill()
    instance.wait_for_state("restarting")
    assert instance.wait_for_state("ready")["restarts"] == 1
    assert instance.api("/v1/completions", SENTENCE).status == 200
    assert instance.stop() == ExitCode.OK


@pytest.mark.slow("repeats with llama-server what the fake engine shows, by timeouts")
def test_a_stopped_engine_is_found_killed_and_comes_back(tmp_path: Path) -> None:
    settings = _settings(model=builtin_model(), context_length=1024, stall_timeout=6)
    with running(tmp_path, **settings) as instance:
        psutil.Process(instance.wait_for_state("ready")["engine_pid"]).suspend()
        instance.wait_for_state("restarting")
        assert instance.wait_for_state("ready")["restarts"] >= 1
        assert instance.stop() == ExitCode.OK


@pytest.mark.slow("repeats with an API key what a drain without one shows")
def test_an_api_key_keeps_drain_and_probes_working(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    settings = _settings(model=builtin_model(), context_length=1024, api_key_file=key)
    with running(tmp_path, **settings) as instance:
        instance.wait_for_state("ready")
        assert instance.api("/v1/completions", SENTENCE).status == 401
        headers = {"Authorization": "Bearer sesame"}
        asked = story(instance, headers=headers)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(instance.api, "/v1/completions", asked, headers=headers, timeout=300)
            instance.wait_for_state("busy")
            instance.process.send_signal(signal.SIGTERM)
            assert answer.result().json["usage"]["completion_tokens"] == asked["max_tokens"]
        assert instance.wait() == ExitCode.OK


def test_a_model_that_it_does_not_know(tmp_path: Path) -> None:
    from support.raw_models import LLAMA, gguf_file, tensor, value

    path = tmp_path / "m.gguf"
    metadata = {key.replace("llama.", "pascaline."): content for key, content in LLAMA.items()}
    metadata["general.architecture"] = value("string", "pascaline")
    path.write_bytes(gguf_file(metadata, [tensor("token_embd.weight", [8], 0, 0)], data_bytes=32))
    with running(tmp_path, **_settings(model=path, context_length=64)) as instance:
        assert instance.wait() == ExitCode.ENGINE_FAILED
        assert instance.error == "the engine ended with exit code 1: llama.cpp does not know the model's architecture"


def test_nothing_is_left_when_its_supervisor_is_killed(own: Callable[..., Instance]) -> None:
    instance = own()
    instance.process.kill()
    instance.wait()
    wait_until("no process is left", lambda: not instance.descendants())
