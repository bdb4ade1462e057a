"""Two instances behind SGLang's router under eight clients: what a rolling restart and a crash cost, by the ledger."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ExitCode
from support.instance import FAKE_ENGINE, PATIENCE, Instance, http, running, wait_until
from support.ledger import Load, Outcome, stretch
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CLIENTS = 8
SPEED = "decode_tokens_per_second=40"
pytestmark = pytest.mark.slow("a minute: two instances behind the real router")


def module_flags() -> list[str]:
    """The flags of the module's command that are numbers."""
    source = (ROOT / "modules/router.nix").read_text()
    return [word for pair in re.findall(r'"(--[a-z-]+)"\s+"?(\d+)"?', source) for word in pair]


@contextlib.contextmanager
def router(*instances: Instance) -> Iterator[int]:
    """Run the router in front of instances, as the module starts it; yields its port."""
    port, urls = free_port(), [each.api_url for each in instances]
    command = [sys.executable, str(ROOT / "modules/run-router.py"), *module_flags(), "--worker-urls", *urls]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until("both are healthy", lambda: healthy(port) == len(urls), seconds=PATIENCE * stretch(), every=0.5)
            yield port
        finally:
            process.terminate()


def healthy(port: int) -> int:
    """Return how many instances the router calls healthy."""
    with contextlib.suppress(OSError):
        answer = http(f"http://127.0.0.1:{port}/workers", timeout=5)
        if answer.status == 200:
            return sum(bool(worker.get("is_healthy")) for worker in answer.json.get("workers", []))
    return 0


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def start(stack: contextlib.ExitStack, folder: Path, model: Path, port: int | None = None) -> Instance:
    folder.mkdir(exist_ok=True)
    settings = {"engine_executable": FAKE_ENGINE, "device": "cpu", "model": model, "served_model_name": "m"}
    settings |= {"drain_timeout": 60, "max_running_requests": 16} | ({"port": port} if port else {})
    instance = stack.enter_context(running(folder, faults=SPEED, **settings))
    instance.wait_for_state("ready", seconds=PATIENCE * stretch())
    return instance


def test_a_rolling_restart_loses_nothing(stack: contextlib.ExitStack, tmp_path: Path, model: Path) -> None:
    one, other = (start(stack, tmp_path / name, model) for name in ("one", "other"))
    with router(one, other) as port, Load(port, clients=CLIENTS, tokens=40, stream=True) as load:
        for number, instance in enumerate((one, other)):
            began = time.monotonic()
            wait_until("a load", lambda since=began: load.ledger.whole_since(since), seconds=PATIENCE * stretch())
            if number:
                instance.process.terminate()
            else:
                assert instance.agent("/drain", {}).status == 202
            assert instance.wait(PATIENCE * stretch()) == ExitCode.OK
            again = start(stack, tmp_path / f"again-{number}", model, instance.settings["port"])
            wait_until("both are healthy", lambda: healthy(port) == 2, seconds=PATIENCE * stretch(), every=0.5)
            # A router that was refused calls an instance healthy some seconds before it sends to it again.
            wait_until(
                "requests", lambda here=again: here.health().get("running_requests"), seconds=PATIENCE * stretch()
            )
    print(load.ledger)
    assert load.ledger.is_balanced
    assert load.ledger.count(Outcome.WHOLE) == load.ledger.sent > CLIENTS, str(load.ledger)


def test_a_crash_costs_only_its_own_streams(stack: contextlib.ExitStack, tmp_path: Path, model: Path) -> None:
    """Each of them gets an explicit end; what is sent later is answered, by the other one at first."""
    one, other = (start(stack, tmp_path / name, model) for name in ("one", "other"))
    with router(one, other) as port, Load(port, clients=CLIENTS, tokens=40, stream=True) as load:
        began = time.monotonic()
        wait_until("a load", lambda: load.ledger.whole_since(began), seconds=PATIENCE * stretch())
        crashed = time.monotonic()
        one.fault(crash_now=1)
        one.wait_for_line("restart 1 in", PATIENCE * stretch())
        one.wait_for_state("ready", "busy", seconds=PATIENCE * stretch())
        wait_until("answers", lambda: load.ledger.whole_since(time.monotonic() - 5), seconds=PATIENCE * stretch())
    print(load.ledger)
    assert load.ledger.is_balanced
    assert load.ledger.count(Outcome.SILENT) == 0
    lost = [entry for entry in load.ledger.entries if entry.outcome is not Outcome.WHOLE]
    # Those that ran in it, at most one for each client; a new one goes to the other instance.
    assert len(lost) <= CLIENTS, str(load.ledger)
    assert all(entry.began <= crashed + 1 for entry in lost), str(load.ledger)
