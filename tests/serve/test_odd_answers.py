"""Answers of an engine that is ill: whatever they are, the supervisor lives, and the instance serves again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ExitCode
from support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.instance import Instance

    Serve = Callable[..., Instance]

GAUGE = 'sglang:num_running_reqs{model_name="m"} '


def ok(body: str) -> str:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}"


METRICS = {
    "a word": ok(f"{GAUGE}abc\n"),
    "half a line": ok(GAUGE),
    "half a number": ok(f"{GAUGE}1"),
    "infinity": ok(f"{GAUGE}+Inf\n"),
    "beyond a float": ok(f"{GAUGE}1e999\n"),
    "a long number": ok(f"{GAUGE}{'9' * 5000}\n"),
    "negative": ok(f"{GAUGE}-1\n"),
    "twice the same series": ok(f"{GAUGE}1\n{GAUGE}2\n"),
    "no text": ok("\xff\xfe\x00"),
    "nothing": ok(""),
    "no HTTP": "hello",
    "a status beyond all": "HTTP/1.1 99999 x\r\n\r\n",
    "a cut chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nab",
    "a chunk of negative size": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nab\r\n0\r\n\r\n",
}
COMPLETIONS = {
    "200,000 brackets": {"raw_answer": "[", "raw_repeat": 200_000},
    "a deep body": {"raw_answer": "HTTP/1.1 200 OK\r\n\r\n" + "[" * 200_000},
    "infinitely many tokens": {"raw_answer": ok('{"usage": {"completion_tokens": 1e999}}')},
    "a list for a map": {"raw_answer": ok("[]")},
    "a list in the map": {"raw_answer": ok('{"usage": []}')},
    "a word for a number": {"raw_answer": ok('{"usage": {"completion_tokens": "many"}}')},
    "true for a number": {"raw_answer": ok('{"usage": {"completion_tokens": true}}')},
    "no text": {"raw_answer": ok("\xff\xfe")},
    "a long number": {"raw_answer": ok('{"usage": {"completion_tokens": ' + "9" * 5000 + "}}")},
    "escape sequences": {"raw_answer": ok("\x1b[2J\x07\r\n")},
}

FAST = {"a deep body", "infinitely many tokens", "no text"}
SLOW = pytest.mark.slow("repeats with other answers how an engine is restarted that generates nothing")
"""Parsing alone is tested in python/pascaline/tests/test_engines_client.py."""


def assert_lives(instance: Instance) -> None:
    """The agent answers at once, and nothing happened that nothing foresaw."""
    start = time.monotonic()
    assert instance.agent("/livez").status == 200
    assert time.monotonic() - start < 5
    assert instance.metric("pascaline_internal_errors_total") == 0
    assert "Traceback" not in instance.text


@pytest.mark.parametrize("name", METRICS)
def test_metrics(shared: Instance, name: str) -> None:
    """An engine whose test generations succeed serves; only what its counters would say is missing."""
    shared.fault(raw_path="/metrics", raw_answer=METRICS[name])
    before = shared.agent("/health").json["last_probe"]["at"]
    wait_until("other test generations", lambda: shared.agent("/health").json["last_probe"]["at"] > before + 1)
    assert_lives(shared)
    assert shared.agent("/readyz").status == 200
    assert shared.health()["restarts"] == 0


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=SLOW) for name in COMPLETIONS])
def test_completions(serve: Serve, name: str) -> None:
    """No generation succeeds: the engine is restarted, and is well then."""
    instance = serve()
    instance.wait_for_state("ready")
    instance.fault(raw_path="/v1/completions", **COMPLETIONS[name])
    report = instance.wait_for_state("restarting")
    assert report["last_probe"]["reason"]
    assert report["last_probe"]["reason"].isprintable()
    instance.wait_for_state("ready")
    assert_lives(instance)
    assert instance.stop() == ExitCode.OK


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/server_info", ok("[]")),
        ("/server_info", ok('{"version": ["0.5.23"]}')),
        ("/server_info", ok('{"version": "' + "x" * 10_000 + '"}')),
        ("/server_info", ok("[" * 200_000)),
        ("/metrics", ok(f"{GAUGE}+Inf\n")),
    ],
)
def test_from_the_start(serve: Serve, path: str, answer: str) -> None:
    instance = serve(faults="start_seconds=1 warmup_seconds=2")
    wait_until("the engine listens", lambda: _is_told(instance, path, answer))
    instance.wait_for_state("ready")
    time.sleep(1)
    assert_lives(instance)
    assert ("sglang" in instance.health()["versions"]) is (path != "/server_info")


def _is_told(instance: Instance, path: str, answer: str) -> bool:
    try:
        return instance.api("/fake/faults", {"raw_path": path, "raw_answer": answer}).status == 200
    except OSError:
        return False
