"""Quality as served: what a server with known log-probabilities is scored, and bounds of the divergence."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.bench.llama_tools import WINDOW_TOKENS
from pascaline.bench.served_quality import TOP_TOKENS, Scores, compare_scores, load_scores, score_server
from pascaline.bench.stream import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HALF = WINDOW_TOKENS // 2


@pytest.fixture
def server() -> Iterator[Callable[[Any], tuple[Endpoint, list[Any]]]]:
    """A server whose /generate gives a fixed answer, and the requests that it got."""
    asked: list[Any] = []
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answers[0]).encode())

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()

    def start(answer: Any) -> tuple[Endpoint, list[Any]]:
        answers.append(answer)
        return Endpoint(f"http://127.0.0.1:{http.server_port}"), asked

    yield start
    http.shutdown()
    thread.join()
    http.server_close()


def sglang_answer(probability: float) -> Any:
    """As SGLang 0.5.23 answers: the first place is unknown; entries are (log-probability, token, text)."""
    top = [[math.log(0.2), 8, None], [math.log(0.7), 7, None]]
    return {
        "meta_info": {
            "input_token_logprobs": [[None, 3, None], *([math.log(probability), 5, None] for _ in range(HALF - 1))],
            "input_top_logprobs": [None, *(top for _ in range(HALF - 1))],
        }
    }


def test_second_half_of_each_window_is_scored(server: Any) -> None:
    endpoint, asked = server(sglang_answer(0.25))
    chunks: list[int] = []
    scores = score_server(endpoint, range(2 * WINDOW_TOKENS + 100), 5, chunks.append)
    assert scores is not None
    assert scores.perplexity == pytest.approx(4.0)
    assert len(scores.logprobs) == 2 * (HALF - 1)
    assert list(scores.tops[0]) == [7, 8]
    # The text ends within the third window.
    assert chunks == [1, 2]
    assert asked[1] == {
        "input_ids": list(range(WINDOW_TOKENS, 2 * WINDOW_TOKENS)),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": HALF,
        "top_logprobs_num": TOP_TOKENS,
    }


def test_a_server_without_log_probabilities_has_no_scores(server: Any) -> None:
    endpoint, _ = server({"text": "x", "meta_info": {"completion_tokens": 1}})
    assert score_server(endpoint, range(WINDOW_TOKENS), 1, lambda _: None) is None


def test_scores_survive_the_file(tmp_path: Path) -> None:
    scores = Scores([-1.5, -0.25], [{7: -0.1, 8: -2.0}, {1: -0.5}])
    scores.save(tmp_path / "scores.json")
    assert load_scores(tmp_path / "scores.json") == scores


weights = st.lists(st.floats(1e-3, 1.0), min_size=6, max_size=6)


def distribution(values: list[float]) -> dict[int, float]:
    """Log-probabilities of six tokens, likeliest first."""
    total = sum(values)
    pairs = sorted(enumerate(values), key=lambda pair: -pair[1])
    return {token: math.log(value / total) for token, value in pairs}


def top(values: dict[int, float], count: int) -> dict[int, float]:
    return dict(list(values.items())[:count])


@given(weights, weights, st.integers(1, 6))
def test_divergence_is_never_above_the_true_one_and_never_negative(a: list[float], b: list[float], count: int) -> None:
    p, q = distribution(a), distribution(b)
    true = sum(math.exp(p[token]) * (p[token] - q[token]) for token in p)
    found = compare_scores(Scores([0.0], [top(p, count)]), Scores([0.0], [top(q, count)]))["served_kl_least"]
    assert -1e-9 <= found <= true + 1e-9


@given(weights, weights)
def test_divergence_of_whole_distributions_is_the_true_one(a: list[float], b: list[float]) -> None:
    p, q = distribution(a), distribution(b)
    true = sum(math.exp(p[token]) * (p[token] - q[token]) for token in p)
    found = compare_scores(Scores([0.0], [p]), Scores([0.0], [q]))
    assert found["served_kl_least"] == pytest.approx(true, abs=1e-9)
    assert found["served_same_top"] == (next(iter(p)) == next(iter(q)))


def test_a_server_is_no_distance_from_itself() -> None:
    scores = Scores([-1.0], [{1: math.log(0.6), 2: math.log(0.1)}])
    assert compare_scores(scores, scores) == {"served_kl_least": pytest.approx(0.0), "served_same_top": 1.0}
