"""The fake engine equals the real one: its series are SGLang's own, its interface is what clients of SGLang use."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pascaline.engines import ENGINES
from prometheus_client.parser import text_string_to_metric_families
from support.instance import FAKE_ENGINE, PATIENCE, Answer, free_port, http, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDED = Path(__file__).parents[1] / "monitoring/pages/sglang.prom"


class Engine:
    """The fake as a process of its own."""

    def __init__(self, *arguments: str, **faults: Any) -> None:
        self.port = free_port()
        command = [str(FAKE_ENGINE), "-m", "sglang.launch_server", "--model-path", "/m", "--served-model-name", "m"]
        words = " ".join(f"{name}={value}" for name, value in faults.items())
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *arguments],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "FAKE_ENGINE_FAULTS": words},
        )
        wait_until("the fake listens", self._listens)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError):
            return self.ask("/fake/faults").status == 200
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, **options: Any) -> Answer:
        return http(self.url + path, body, **options)

    def complete(self, prompt: str = "a b", max_tokens: int = 4, **options: Any) -> Answer:
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens}, **options)

    def sample(self, name: str) -> float:
        lines = self.ask("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sglang:{name}{{"))


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[Any]:
    with contextlib.ExitStack() as processes:

        def start(*arguments: str, **faults: Any) -> Engine:
            engine = Engine(*arguments, **faults)
            processes.callback(engine.process.wait)
            processes.callback(engine.process.kill)
            return engine

        yield start


class TestMetrics:
    def test_each_series_is_one_that_sglang_has_with_its_labels(self, fake: Any) -> None:
        engine = fake()
        engine.complete()
        real = {
            sample.name: (family.type, set(sample.labels))
            for family in text_string_to_metric_families(RECORDED.read_text())
            for sample in family.samples
        }
        for family in text_string_to_metric_families(engine.ask("/metrics").text):
            for sample in family.samples:
                assert (family.type, set(sample.labels)) == real[sample.name], sample.name

    def test_histograms_have_sglangs_bounds(self, fake: Any) -> None:
        def bounds(page: str) -> dict[str, set[str]]:
            found: dict[str, set[str]] = {}
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    if sample.name.endswith("_bucket"):
                        found.setdefault(sample.name, set()).add(sample.labels["le"])
            return found

        engine = fake()
        engine.complete()
        real, faked = bounds(RECORDED.read_text()), bounds(engine.ask("/metrics").text)
        assert len(faked) == 3
        assert {name: real[name] for name in faked} == faked

    def test_counters_follow_requests(self, fake: Any) -> None:
        engine = fake()
        engine.complete("a b c", max_tokens=5)
        assert engine.sample("prompt_tokens_total") == 3
        assert engine.sample("generation_tokens_total") == 5
        assert engine.sample("realtime_tokens_total") == 8
        assert engine.sample("time_to_first_token_seconds_count") == 1
        assert engine.sample("inter_token_latency_seconds_count") == 4
        assert engine.sample("num_running_reqs") == 0

    def test_the_supervisors_reading(self, fake: Any) -> None:
        engine = fake()
        progress = ENGINES["sglang"].progress(engine.ask("/metrics").text)
        assert progress is not None
        assert (progress.tokens, progress.has_work) == (0.0, False)


class TestInterface:
    def test_models(self, fake: Any) -> None:
        [model] = fake("--context-length", "512").ask("/v1/models").json["data"]
        assert (model["id"], model["max_model_len"], model["owned_by"]) == ("m", 512, "sglang")

    def test_chat(self, fake: Any) -> None:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        [choice] = fake().ask("/v1/chat/completions", body).json["choices"]
        assert choice["message"] == {"role": "assistant", "content": "This is the fake engine."}

    def test_a_stream_arrives_piece_by_piece(self, fake: Any) -> None:
        engine = fake(decode_tokens_per_second=10)
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "stream": True}
        request = urllib.request.Request(f"{engine.url}/v1/chat/completions", json.dumps(body).encode())
        events, times = [], []
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            for line in answer:
                if line.startswith(b"data: "):
                    events.append(line.removeprefix(b"data: ").decode().strip())
                    times.append(time.monotonic())
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(chunk["delta"]["content"] for chunk in chunks) == "This is the fake engine."
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
        # Five tokens at ten a second, none of them held back to the end.
        assert times[-1] - times[0] > 0.3

    def test_a_prompt_beyond_the_context(self, fake: Any) -> None:
        answer = fake("--context-length", "16").complete("word " * 16)
        assert answer.status == 400
        assert answer.json["message"] == (
            "The input (16 tokens) is longer than the model's context length (16 tokens)."
        )

    def test_a_full_queue(self, fake: Any) -> None:
        engine = fake("--max-running-requests", "1", "--max-queued-requests", "1", decode_tokens_per_second=20)
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(engine.complete, max_tokens=20)
            wait_until("one runs", lambda: engine.sample("num_running_reqs") == 1)
            second = pool.submit(engine.complete, max_tokens=1)
            wait_until("one waits", lambda: engine.sample("num_queue_reqs") == 1)
            refused = engine.complete()
            assert (refused.status, refused.json["message"]) == (503, "The request queue is full.")
            assert refused.headers["Retry-After"] == "1"
            assert (first.result().status, second.result().status) == (200, 200)

    def test_many_at_once(self, fake: Any) -> None:
        engine = fake("--max-running-requests", "4")
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda n: engine.complete(max_tokens=n % 7 + 1), range(64)))
        assert {answer.status for answer in answers} == {200}
        assert engine.sample("generation_tokens_total") == sum(n % 7 + 1 for n in range(64))

    def test_an_unknown_fault_is_refused(self, fake: Any) -> None:
        answer = fake().ask("/fake/faults", {"hnag": 1})
        assert answer.status == 400
        assert answer.json["message"].startswith("unknown fault 'hnag', must be one of: start_seconds, ")


class TestEnds:
    def test_sigterm_drains(self, fake: Any) -> None:
        engine = fake(decode_tokens_per_second=20)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.complete, max_tokens=20)
            wait_until("one runs", lambda: engine.sample("num_running_reqs") == 1)
            engine.process.terminate()
            wait_until("health says so", lambda: engine.ask("/health").status == 503)
            refused = engine.complete()
            assert refused.status == 503
            assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("5", "close")
            assert answer.result().json["usage"]["completion_tokens"] == 20
        assert engine.process.wait(PATIENCE) == 0

    def test_a_stream_that_is_cut_off(self, fake: Any) -> None:
        engine = fake(cut_stream_after=2)
        body = {"prompt": "a", "max_tokens": 10, "stream": True}
        with pytest.raises(ConnectionError, match="IncompleteRead"):
            engine.ask("/v1/completions", body)

    @pytest.mark.parametrize(("code", "ended"), [("7", 7), (str(-signal.SIGSEGV), -signal.SIGSEGV)])
    def test_a_chosen_exit_code(self, fake: Any, code: str, ended: int) -> None:
        engine = fake(exit_code=code, crash_after_requests=1, decode_tokens_per_second=1)
        with pytest.raises(OSError, match=r"."):
            engine.complete()
        assert engine.process.wait(PATIENCE) == ended
