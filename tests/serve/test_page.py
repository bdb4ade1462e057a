"""The agent's page on a real instance: its live snapshots, and questions that it passes on."""

from __future__ import annotations

import contextlib
import json
from http.client import HTTPConnection, HTTPResponse
from typing import TYPE_CHECKING, Any

import psutil
from pascaline.errors import ExitCode
from pascaline.serving.chat import MOST_QUESTIONS
from pascaline.serving.page import MOST_PAGES
from support.instance import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.instance import Instance

    Serve = Callable[..., Instance]

QUESTION = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 8}
MOST_MEMORY = 60 * 2**20


@contextlib.contextmanager
def exchange(instance: Instance, method: str, path: str, body: Any = None, **headers: str) -> Iterator[HTTPResponse]:
    """Ask the agent; yield the answer, and close everything."""
    connection = HTTPConnection("127.0.0.1", instance.settings["agent_port"], timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    with contextlib.closing(connection), connection.getresponse() as answer:
        yield answer


def events(instance: Instance) -> contextlib.AbstractContextManager[HTTPResponse]:
    """Open the page's stream."""
    return exchange(instance, "GET", "/events")


def ask(
    instance: Instance, question: dict[str, Any] = QUESTION, **headers: str
) -> contextlib.AbstractContextManager[HTTPResponse]:
    """Ask the model through the page."""
    return exchange(instance, "POST", "/chat", question, **headers)


def snapshots(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The snapshots of a stream, to its end."""
    for line in answer:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def texts(body: bytes) -> str:
    """The text of a streamed chat."""
    data = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content", "") for each in data for choice in each.get("choices", []))


class TestEvents:
    def test_ten_pages_follow_the_state_to_the_end(self, serve: Serve) -> None:
        instance = serve(faults="start_seconds=1")
        instance.wait_for_state("starting")
        with contextlib.ExitStack() as stack:
            pages = [stack.enter_context(events(instance)) for _ in range(10)]
            assert {page.headers["content-type"] for page in pages} == {"text/event-stream; charset=utf-8"}
            first = [next(snapshots(page)) for page in pages]
            assert {snapshot["state"] for snapshot in first} == {"starting"}
            assert [row[0] for row in first[0]["tables"]["stages"] if row[2] == "runs"] == ["load"]
            assert next(snapshot for snapshot in snapshots(pages[0]) if snapshot["state"] == "ready")
            assert psutil.Process(instance.process.pid).memory_info().rss < MOST_MEMORY
            # Open pages do not delay the end.
            assert instance.stop() == ExitCode.OK
            assert [list(snapshots(page))[-1]["state"] for page in pages] == ["stopped"] * 10
        assert "graceful" not in instance.text

    def test_a_start_that_fails_is_the_last_thing_that_is_shown(self, serve: Serve) -> None:
        instance = serve(faults="start_seconds=2 load_error=architecture")
        instance.wait_for_state("starting")
        with events(instance) as page:
            last = list(snapshots(page))[-1]
        assert last["state"] == last["texts"]["state"] == "failed"
        assert (
            last["texts"]["reason"]
            == "the engine ended with exit code 1: SGLang does not know the model's architecture"
        )
        assert last["runbook"].endswith("#instancerestartloop")
        assert instance.wait() != ExitCode.OK

    def test_restarts_are_told_with_their_reasons_and_pages_have_a_limit(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        instance.wait_for_state("ready")
        with contextlib.ExitStack() as stack:
            pages = [stack.enter_context(events(instance)) for _ in range(MOST_PAGES)]
            *_, snapshot = [next(snapshots(page)) for page in pages]
            refused = instance.agent("/events")
            assert (refused.status, refused.headers["retry-after"]) == (503, "10")
            assert instance.agent("/readyz").status == 200
        wait_until("a free place", lambda: _status(events(instance)) == 200)
        assert snapshot["texts"]["restarts"] == "1"
        changes = [(state, reason) for _, state, reason in snapshot["tables"]["changes"]]
        assert changes[0] == ("ready", "a generation succeeded")
        assert changes[2] == (
            "restarting",
            "the engine ended with signal SIGKILL: RuntimeError: the fake engine was told to crash",
        )


class TestQuestions:
    def test_an_answer_is_streamed_and_what_the_engine_refuses_is_passed_on(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        with ask(instance) as answer:
            assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            body = answer.read()
        assert texts(body) == "This is the fake engine. This is the"
        assert body.endswith(b"data: [DONE]\n\n")
        assert b'"completion_tokens": 8' in body
        instance.fault(error_status=503, words="The request queue is full.")
        with ask(instance) as answer:
            assert (answer.status, json.loads(answer.read())["message"]) == (503, "The request queue is full.")

    def test_the_key_is_asked_for_and_passed_on(self, serve: Serve, tmp_path: Path) -> None:
        key = tmp_path / "key"
        key.write_text("sesame-open\n")
        instance = serve(api_key_file=key)
        instance.wait_for_state("ready")
        assert _status(ask(instance)) == 401
        assert _status(ask(instance, Authorization="Bearer wrong")) == 401
        with ask(instance, Authorization="Bearer sesame-open") as answer:
            assert texts(answer.read()).startswith("This is")
        assert "sesame" not in instance.agent("/").text

    def test_pages_that_leave_stop_their_questions_of_which_some_may_run(self, serve: Serve) -> None:
        instance = serve(faults="decode_tokens_per_second=20")
        instance.wait_for_state("ready")
        with contextlib.ExitStack() as answers:
            for _ in range(MOST_QUESTIONS):
                answer = answers.enter_context(ask(instance, QUESTION | {"max_tokens": 4000}))
                assert answer.status == 200
                assert answer.readline().startswith(b"data: ")
            with ask(instance) as refused:
                assert (refused.status, json.loads(refused.read())["detail"]) == (
                    503,
                    "4 questions from pages run already; wait for one of them",
                )
            instance.wait_for_state("busy")
        wait_until("no request that runs", lambda: instance.health()["running_requests"] == 0)
        wait_until("a free place", lambda: _status(ask(instance)) == 200)

    def test_an_engine_that_dies_is_told(self, serve: Serve) -> None:
        instance = serve(faults="decode_tokens_per_second=20")
        instance.wait_for_state("ready")
        with ask(instance, QUESTION | {"max_tokens": 4000}) as answer:
            assert answer.readline().startswith(b"data: ")
            instance.fault(crash_now=1)
            rest = answer.read()
        assert b"[DONE]" not in rest
        last = json.loads(rest.rstrip().rpartition(b"data: ")[2])
        assert last["error"]["message"].startswith("the engine's answer broke off: ")


def _status(exchanged: contextlib.AbstractContextManager[HTTPResponse]) -> int:
    with exchanged as answer:
        answer.readline()
        return answer.status
