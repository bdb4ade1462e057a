"""A spawned worker ends with its server, whichever of the two comes first: the death or the request."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from sglang_pascal import orphans
from sglang_pascal.orphans import in_a_fork

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 60.0
# As in SGLang, the worker's imports run before multiprocessing knows the parent.
SERVER = """
import multiprocessing, sys, time
sys.path.insert(0, {folder!r})

if __name__ == "__main__":
    from sglang_pascal.orphans import die_with_parent
    die_with_parent()
    import worker_of_test
    process = multiprocessing.get_context("spawn").Process(target=worker_of_test.work)
    process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""
WORKER = """
import multiprocessing, sys, time
from pathlib import Path

if "--multiprocessing-fork" in sys.orig_argv:
    Path({started!r}).touch()
    time.sleep({late})
    from sglang_pascal.orphans import die_with_parent
    die_with_parent()
    Path({asked!r}).touch()

def work():
    time.sleep(600)
"""


def wait_until(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
@pytest.mark.parametrize("late", [0.0, 2.0])
def test_a_worker_ends_with_its_server(tmp_path: Path, late: float, *, reaped: bool) -> None:
    """In a container the server can stay a zombie, if process 1 does not ask for its end."""
    started, asked = tmp_path / "started", tmp_path / "asked"
    (tmp_path / "worker_of_test.py").write_text(WORKER.format(started=str(started), asked=str(asked), late=late))
    server = tmp_path / "server.py"
    server.write_text(SERVER.format(folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, server], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        wait_until(started.exists if late else asked.exists)
        assert is_alive(worker)
        process.kill()
        if reaped:
            process.wait()
        wait_until(lambda: not is_alive(worker))


def test_a_process_that_nobody_spawned_is_left_alone() -> None:
    code = "from sglang_pascal.orphans import die_with_parent; die_with_parent(); print('alive')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ended.stdout == "alive\n"


FORKING = """
import multiprocessing, sys, time

def work():
    print(multiprocessing.current_process().pid, "heavy" in sys.modules, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    from sglang_pascal.orphans import die_with_parent, fork_workers
    die_with_parent()
    fork_workers(None, "arguments as of SGLang's hooks")
    sys.modules["heavy"] = sys
    multiprocessing.Process(target=work).start()
    time.sleep(600)
"""


def test_a_forked_worker_imports_nothing_anew_and_ends_with_its_server(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(FORKING)
    with subprocess.Popen([sys.executable, server], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker, has_modules = process.stdout.readline().split()
        assert has_modules == "True"
        assert is_alive(int(worker))
        process.kill()
        process.wait()
        wait_until(lambda: not is_alive(int(worker)))


def test_a_server_that_has_initialised_cuda_does_not_fork(monkeypatch, caplog) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setattr(orphans, "devices", lambda: ("a card",))
    monkeypatch.setattr(orphans, "is_cuda_initialized", lambda: True)
    orphans.fork_workers()
    assert multiprocessing.get_start_method(allow_none=True) == before
    assert caplog.messages == [
        "workers import everything anew, which takes some dozen seconds longer: "
        "something has initialised CUDA in the server's process, so it cannot fork them"
    ]


ASKED = """
import torch
from sglang_pascal.orphans import _torchs_answer, in_a_fork
flags = in_a_fork(torch._C._cuda_getArchFlags)
print(bool(flags.split()), in_a_fork(_torchs_answer))
torch._C._cuda_getArchFlags()
print(in_a_fork(_torchs_answer))
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="torch has no CUDA part")
def test_a_question_to_torch_in_a_fork_leaves_later_forks_the_gpu() -> None:
    """Torch refuses CUDA in a process that is forked after something asked for its flags, without initialising CUDA."""
    ended = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ended.stdout == "True allowed\nrefused\n"


@pytest.mark.parametrize("answer", ["refused", ""], ids=["refused", "no answer"])
def test_a_server_whose_torch_refuses_a_fork_does_not_fork(answer, monkeypatch, caplog) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setattr(orphans, "devices", lambda: ("a card",))
    monkeypatch.setattr(orphans, "_torchs_answer", lambda: answer)
    orphans.fork_workers()
    assert multiprocessing.get_start_method(allow_none=True) == before
    assert len(caplog.messages) == 1


def test_a_question_that_fails_in_a_fork_has_no_answer() -> None:
    assert in_a_fork(lambda: str(1 / 0)) == ""


def test_a_server_without_a_card_forks_whatever_torch_was_asked(monkeypatch) -> None:
    methods: list[str] = []
    monkeypatch.setattr(orphans, "devices", tuple)
    monkeypatch.setattr(orphans, "_torchs_answer", lambda: "refused")
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, force: methods.append(method))
    for function in ("keep_what_is_there", "os.register_at_fork"):
        monkeypatch.setattr(f"sglang_pascal.orphans.{function}", lambda **_: None)
    monkeypatch.setenv(orphans.NUMA_BY_COMMAND, "1")
    orphans.fork_workers()
    assert methods == ["fork"]
