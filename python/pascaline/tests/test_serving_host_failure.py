"""A lack on this host does not count against the engine: it is started again, and no restart counts as a crash."""

from __future__ import annotations

import asyncio
import errno
import io
from typing import Any

import pytest
from pascaline.configuration import Configuration
from pascaline.errors import EngineError
from pascaline.serving.console import Console
from pascaline.serving.failure import Failure, FailureKind
from pascaline.serving.notify import Notifier
from pascaline.serving.supervisor import Stopped, Supervisor
from pascaline.settings import Settings

CRASH = Failure(FailureKind.CRASH, "it crashed")


def supervise(monkeypatch: pytest.MonkeyPatch, runs: list[Any], **settings: Any) -> tuple[list[int], Exception]:
    """Let each run of the engine end in a given way; return the numbers of the restarts, and what ended the last."""
    configuration = Configuration(Settings(**settings), None, {})
    supervisor = Supervisor(configuration, Console(io.StringIO()), Notifier(None, None))
    left, restarts = iter(runs), list[int]()

    async def run_once(_: Any) -> Any:
        outcome = next(left)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def as_verified(task: Any) -> Any:
        return task

    async def pause(in_a_row: int, _: Failure) -> None:
        restarts.append(in_a_row)

    for name, stand_in in (("_run_once", run_once), ("_as_verified", as_verified), ("_pause_before_restart", pause)):
        monkeypatch.setattr(supervisor, name, stand_in)
    with pytest.raises((Stopped, EngineError, OSError)) as ended:
        asyncio.run(supervisor._keep_running(None))  # type: ignore[arg-type]  # nothing here looks at the task
    return restarts, ended.value


def lack(number: int) -> OSError:
    return OSError(number, "lacking")


def test_it_is_tried_again_however_often_and_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = [lack(number) for number in (errno.EMFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC) for _ in range(5)]
    runs = [(5.0, CRASH), *lacking, (5.0, CRASH), Stopped()]
    restarts, ended = supervise(monkeypatch, runs, max_restarts=2)
    assert isinstance(ended, Stopped)
    assert restarts == [1, *[2] * 20, 2]


def test_one_that_never_served_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts, ended = supervise(monkeypatch, [lack(errno.EMFILE)])
    assert (restarts, str(ended)) == ([], "this host lacks what a start needs: [Errno 24] lacking")


def test_another_error_is_none_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ended = supervise(monkeypatch, [(5.0, CRASH), PermissionError(errno.EACCES, "denied")])
    assert isinstance(ended, PermissionError)
