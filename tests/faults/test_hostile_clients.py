"""Clients that mean harm, to agent and exporter: malformed requests by the thousand, slow ones, and any valid call.

The agent has an API key, so that no call of a client without it may end the instance.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from faults.injectors import ONE_P4
from faults.noise import send_noise
from faults.scene import IMPATIENT, KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pascaline.errors import ExitCode
from pascaline.gpu.fake_nvml import write_scenario
from support.instance import PATIENCE, Instance, http, running, wait_until
from support.ledger import stretch
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW, MANY = 2_000, 100_000
ANSWER_SECONDS = 5.0
"""Longest wait of an honest client while others send noise."""
SEED, CALLS = 17, 40
"""Of schemathesis; the calls are the most for each path and method."""
LOOK_SECONDS = 0.2
"""Pause between two requests of an honest client."""


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("hostile")
    model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
    key = folder / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    own = {"model": model, "api_key_file": key, "stall_timeout": 30, "probe_interval": 2}
    with running(folder, **IMPATIENT | own) as started:
        started.wait_for_state("ready", seconds=PATIENCE * stretch())
        yield started
        assert started.health()["restarts"] == 0
        assert started.metric("pascaline_internal_errors_total") == 0
        assert started.stop() == ExitCode.OK
        assert "Traceback" not in started.text


@pytest.fixture(scope="module")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an exporter."""
    scenario = tmp_path_factory.mktemp("exporter") / "host.nvml"
    write_scenario(scenario, ONE_P4)
    command = [sys.executable, "-m", "pascaline", "exporter", "--port=0", f"--demo={scenario}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        yield int(url.rpartition(":")[2].partition("/")[0])
        process.terminate()
        assert process.wait(PATIENCE * stretch()) == 0
        assert "Traceback" not in process.stderr.read()


def answers(port: int, path: str) -> bool:
    began = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
        answer.read()
        return bool(answer.status == 200) and time.monotonic() - began < ANSWER_SECONDS * stretch()


COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow("half a minute: 100,000 malformed requests"))]


def all_answered(port: int, path: str, over: threading.Event) -> bool:
    """Ask like an honest client until it is over."""
    answered = answers(port, path)
    while answered and not over.wait(LOOK_SECONDS):
        answered = answers(port, path)
    return answered


def noise_harms_nobody(port: int, count: int) -> bool:
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        honest = pool.submit(all_answered, port, "/livez", over)
        try:
            send_noise(port, count)
        finally:
            over.set()
        return honest.result()


@pytest.mark.parametrize("count", COUNTS)
def test_noise_to_the_agent(instance: Instance, count: int) -> None:
    assert noise_harms_nobody(instance.settings["agent_port"], count)
    assert instance.health()["state"] in {"ready", "busy"}


@pytest.mark.parametrize("count", COUNTS)
def test_noise_to_the_exporter(exporter: int, count: int) -> None:
    assert noise_harms_nobody(exporter, count)
    assert answers(exporter, "/metrics")


@pytest.mark.parametrize("whom", ["agent", "exporter"])
def test_a_slow_loris_costs_others_nothing(instance: Instance, exporter: int, whom: str) -> None:
    port = instance.settings["agent_port"] if whom == "agent" else exporter
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
        for position in range(20):
            for each in slow:
                with contextlib.suppress(OSError):
                    each.sendall(b"GET /livez HTTP/1.1\r\nX: yyyyyyyy"[position : position + 1])
            assert answers(port, "/livez")
        # Each is closed, however busily it drips.
        wait_until("the first is closed", lambda: _is_closed(slow[0]), seconds=PATIENCE * stretch(), every=0.5)


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        connection.sendall(b"y")
        return connection.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_any_call_that_the_interface_describes(instance: Instance, tmp_path: Path) -> None:
    """schemathesis finds no internal error and no answer that is not described, and nothing that it sends drains.

    It has no key, so other methods than those described get 401, not 405.
    """
    url = f"http://127.0.0.1:{instance.settings['agent_port']}/openapi.json"
    options = ["--phases=coverage,fuzzing", f"--max-examples={CALLS}", f"--seed={SEED}"]
    options.append("--exclude-checks=unsupported_method")
    command = [Path(sys.executable).with_name("schemathesis"), "run", url, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert instance.health()["state"] in {"ready", "busy"}


METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?"), max_size=20)
HEADERS = st.dictionaries(
    st.sampled_from(["Accept", "Range", "If-Match", "Content-Type", "X-Forwarded-Host"]), TEXTS, max_size=2
)


@pytest.fixture(scope="module")
def interface(instance: Instance) -> dict[str, Any]:
    found: dict[str, Any] = instance.agent("/openapi.json").json
    return found


def test_every_path_and_method_is_answered_as_described(instance: Instance, interface: dict[str, Any]) -> None:
    """Each pair once and with the key, also the methods that are not described."""
    url = f"http://127.0.0.1:{instance.settings['agent_port']}"
    for path, operations in interface["paths"].items():
        for method in METHODS:
            if (path, method) == ("/drain", "POST"):
                continue
            body = None if method == "GET" else {}
            answer = http(url + path, body, method=method, headers=WITH_KEY, timeout=PATIENCE)
            described = {int(status) for status in operations.get(method.lower(), {}).get("responses", {})}
            assert answer.status in (described or {405}), (method, path, answer)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_calls_that_nobody_describes(instance: Instance, interface: dict[str, Any], data: st.DataObject) -> None:
    """The interface has no parameters, so schemathesis sends no query and no body, and it knows no other paths."""
    paths = interface["paths"]
    path = data.draw(st.sampled_from(sorted(paths)) | TEXTS.map(lambda text: f"/{text}"))
    method = data.draw(st.sampled_from(METHODS))
    if (path.partition("?")[0].rstrip("/") or "/") == "/drain" and method == "POST":
        return
    query = data.draw(st.sampled_from(["", "?a=1", "?%00", "?" + "x" * 500]))
    body = data.draw(st.none() | st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2))
    answer = http(
        f"http://127.0.0.1:{instance.settings['agent_port']}{path}{query}",
        None if method == "GET" else body,
        headers=data.draw(HEADERS) | WITH_KEY,
        method=method,
        timeout=PATIENCE,
    )
    described = {int(status) for status in paths.get(path, {}).get(method.lower(), {}).get("responses", {})}
    assert answer.status in (described or {200, 307, 400, 403, 404, 405}), (method, path, answer)
    if answer.headers.get("content-type") == "application/json":
        json.loads(answer.body)
