"""The worst faults of the table, done to the real SGLang: one instance under load bears them one after the other."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from faults import injectors
from faults.injectors import listener
from faults.scene import Watcher
from pascaline.errors import ExitCode
from support.instance import Answer, Instance, running, wait_until
from support.ledger import Load, Outcome, stretch
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow("starts and restarts a real engine five times"),
    pytest.mark.timeout(1800),
]

START_SECONDS = 400
"""A start takes 20 s on two idle cores; on a machine under load many times that."""
STALL_SECONDS = 10.0
DETECT_SECONDS = STALL_SECONDS + 12.0
"""As in the table: with the default of stall_timeout it is below 60 s."""
SMALL = {"device": "cpu", "context_length": 256, "max_running_requests": 4, "threads": 1, "served_model_name": "m"}
SETTINGS = SMALL | {"start_timeout": START_SECONDS, "probe_interval": 1, "drain_timeout": 60, "max_restarts": 20}
QUEUE = 4
"""Requests that may wait: the load's two and the test generation never fill it."""


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One instance for all tests, in the order in which they stand: the last one ends it."""
    folder = tmp_path_factory.mktemp("sglang")
    model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
    with running(
        folder, model=model, stall_timeout=STALL_SECONDS * stretch(), max_queued_requests=QUEUE, **SETTINGS
    ) as started:
        started.wait_for_state("ready", seconds=START_SECONDS)
        yield started


@contextlib.contextmanager
def under_load(instance: Instance) -> Iterator[Load]:
    """Send requests while the block runs; each must be answered whole, refused, or cut with an end that its client sees."""
    with Load(instance.settings["port"]) as load:
        wait_until("a load", lambda: load.ledger.count(Outcome.WHOLE) >= 2, seconds=START_SECONDS)
        yield load
    assert load.ledger.is_balanced, load.ledger
    assert load.ledger.count(Outcome.SILENT) == 0, load.ledger


def engine_process(instance: Instance, name: str) -> psutil.Process:
    """Return SGLang's process of this role by its title, which the kernel cuts to 15 characters."""
    found: psutil.Process = wait_until(
        name,
        lambda: next((each for each in instance.descendants() if each.name().startswith(f"sglang::{name}")), None),
        seconds=START_SECONDS,
    )
    return found


def recovers(instance: Instance, load: Load) -> None:
    """Wait until a request that is sent from now on is answered whole."""
    instance.wait_for_state("starting", "ready", "busy", seconds=START_SECONDS)
    began = time.monotonic()
    wait_until("an answer", lambda: load.ledger.whole_since(began), seconds=START_SECONDS)
    instance.wait_for_state("ready", "busy", seconds=START_SECONDS)


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("sched", signal.SIGSTOP, "no token for"),
        ("detok", signal.SIGSTOP, "no token for"),
        ("sched", signal.SIGKILL, "the engine ended"),
    ],
    ids=["scheduler-stopped", "detokenizer-stopped", "scheduler-killed"],
)
def test_a_process_of_the_engine(instance: Instance, name: str, number: signal.Signals, said: str) -> None:
    """One that is stopped is found by silence, one that is killed by its end; both are replaced."""
    lines, restarts = len(instance.lines), instance.health()["restarts"]
    with under_load(instance) as load, Watcher(instance.settings["agent_port"]) as watcher:
        process, began = engine_process(instance, name), time.monotonic()
        process.send_signal(number)
        limit = DETECT_SECONDS * stretch()
        wait_until("detection", lambda: watcher.first(began, False), seconds=limit)
        instance.wait_for_state("restarting", "starting", "ready", "busy", seconds=START_SECONDS)
        recovers(instance, load)
    assert instance.health()["restarts"] == restarts + 1
    assert any(said in line for line in instance.lines[lines:])


def test_a_stolen_port_and_a_kill_while_it_loads(instance: Instance) -> None:
    """The tokenizer's process is killed, its port taken before the restart, and then the kernel's OOM killer ends the load."""
    lines = len(instance.lines)
    with under_load(instance) as load:
        psutil.Process(instance.health()["engine_pid"]).kill()
        with wait_until("the port", lambda: listener(instance.settings["port"]), seconds=30, every=0.01):
            named = "is in use by"
            wait_until(named, lambda: any(named in line for line in instance.lines[lines:]), seconds=60 * stretch())
        engine_process(instance, "sched").kill()
        recovers(instance, load)
    said = "\n".join(instance.lines[lines:])
    assert said.count("→ restarting: ") >= 3, said
    assert "gave up" not in said


@pytest.mark.parametrize(
    "inject",
    [
        injectors.connections(1_100, b"GET /health HTTP/1.1\r\nHost: x\r\n"),
        injectors.connections(300, b"POST /v1/completions HTTP/1.1\r\n", port="port"),
        injectors.both(
            injectors.signal_supervisor("SIGSTOP"), injectors.wait(3.0), injectors.signal_supervisor("SIGCONT")
        ),
    ],
    ids=["half-requests-to-the-agent", "half-requests-to-the-engine", "supervisor-paused"],
)
def test_what_may_change_nothing(instance: Instance, inject: injectors.Inject) -> None:
    """Every request is answered whole, and the engine stays."""
    engine = instance.health()["engine_pid"]
    with under_load(instance) as load, contextlib.ExitStack() as after:

        def send(name: str) -> None:
            instance.process.send_signal(signal.Signals[name])

        inject(SimpleNamespace(instance=instance, after=after, signal=send))  # type: ignore[arg-type]
        began = time.monotonic()
        wait_until("an answer", lambda: load.ledger.whole_since(began), seconds=START_SECONDS)
    assert load.ledger.count(Outcome.WHOLE) == load.ledger.sent, load.ledger
    assert instance.wait_for_state("ready", "busy", seconds=START_SECONDS)["engine_pid"] == engine


TOKENS = {"max_tokens": 100, "ignore_eos": True}
MESSAGES = {"messages": [{"role": "user", "content": "a b c"}]}
GENERATE = {"text": "a b c", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
WORK: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": "a b c", **TOKENS},
    "/v1/chat/completions": {"model": "m", **MESSAGES, **TOKENS},
    "/invocations": {"model": "m", **MESSAGES, **TOKENS},
    "/v1/responses": {"model": "m", "input": "a b c", "max_output_tokens": 100, "ignore_eos": True},
    "/v1/messages": {"model": "m", **MESSAGES, "max_tokens": 100},
    "/api/chat": {"model": "m", **MESSAGES, "options": {"num_predict": 100}},
    "/api/generate": {"model": "m", "prompt": "a b c", "options": {"num_predict": 100}},
    "/generate": GENERATE,
}
"""Requests of every API that SGLang generates for."""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", WORK)
def test_a_full_queue(instance: Instance, path: str, stream: bool) -> None:
    """Of four times as many requests as fit, each is answered whole or refused: 503 before a stream begins, and when to try again."""
    count = 4 * (SMALL["max_running_requests"] + QUEUE)
    at_once = threading.Barrier(count)

    def ask(_: int) -> Answer:
        at_once.wait(START_SECONDS)
        return instance.api(path, WORK[path] | {"stream": stream}, timeout=START_SECONDS)

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask, range(count)))
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) >= count // 4
    assert len(answers) - len(refused) >= SMALL["max_running_requests"]
    for answer in refused:
        assert (answer.status, answer.headers["retry-after"]) == (503, "1"), answer.text
        assert "The request queue is full." in answer.text
        assert _is_in_shape(path, answer.json), answer.text
    for answer in answers:
        if answer.status == 200:
            assert "queue is full" not in answer.text
            assert not stream or answer.text.rstrip().splitlines()[-1].startswith(_LAST[path.rpartition("/")[0]])


_LAST = {"/v1": ("data: [DONE]", "data: {"), "/v1/chat": "data: [DONE]", "/api": "{", "": "data: [DONE]"}
"""How the last line of a whole stream begins."""


def _is_in_shape(path: str, document: Any) -> bool:
    """Whether an error has the shape of its API."""
    if path == "/v1/messages":
        return (document["type"], document["error"]["type"]) == ("error", "overloaded_error")
    if path.startswith("/v1/"):
        return document["error"]["type"] == "server_error"
    return bool({"error", "detail", "message"} & document.keys())


def test_a_full_queue_of_scores(instance: Instance) -> None:
    """What generates no text waits in the same queue."""
    count = 4 * (SMALL["max_running_requests"] + QUEUE)
    body = {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [1, 2]}
    with ThreadPoolExecutor(count + 8) as pool:
        busy = [pool.submit(instance.api, "/generate", GENERATE, timeout=START_SECONDS) for _ in range(8)]
        answers = list(pool.map(lambda _: instance.api("/v1/score", body, timeout=START_SECONDS), range(count)))
        wait(busy)
    assert {answer.status for answer in answers} <= {200, 503}, [answer.text for answer in answers]
    for answer in answers:
        if answer.status == 503:
            assert answer.headers["retry-after"] == "1"
            assert _is_in_shape("/v1/score", answer.json), answer.text


def test_sigterm_under_load(instance: Instance) -> None:
    """What was accepted is answered whole, new work is refused, and nothing is left."""
    with under_load(instance) as load:
        signalled = time.monotonic()
        instance.process.send_signal(signal.SIGTERM)
        assert instance.wait(START_SECONDS) == ExitCode.OK
    # A later connection may meet the end of the listener.
    accepted = [each for each in load.ledger.entries if each.began < signalled]
    assert {each.outcome for each in accepted} == {Outcome.WHOLE}, load.ledger
    assert instance.descendants() == []
    assert "draining → stopped" in instance.text
    assert " pascaline: Traceback" not in instance.text
