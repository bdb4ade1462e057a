"""Clients that mean harm, to agent and exporter: malformed requests by the thousand, slow ones, and any valid call."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from faults.injectors import ONE_P4
from faults.scene import IMPATIENT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pascaline.errors import ExitCode
from pascaline.gpu.fake_nvml import write_scenario
from support.instance import PATIENCE, Instance, http, running, wait_until
from support.ledger import stretch
from support.models import tiny, write_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = 17
FEW, MANY = 2_000, 100_000
ANSWER_SECONDS = 5.0
"""Longest wait of an honest client while others send noise, on a loaded machine."""
PARTS = (
    *(
        b"GET ",
        b"POST ",
        b"HEAD ",
        b"PUT ",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00",
        b"\xff" * 40,
    ),
    *(b"/metrics", b"/health", b"/drain", b"/..%2f..%2fetc/passwd", b"//", b"/%00", b"*", b"/" + b"a" * 9000),
    *(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/9.9\r\n", b"\r\n", b"\n", b"\r\n\r\n", b" "),
    *(b"Host: x\r\n", b"Host: \r\nHost: y\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n\r\nzz\r\n",
        b"0\r\n\r\n",
        b"ffffffffff\r\n",
    ),
    *(
        b"Expect: 100-continue\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n",
        b": empty\r\n",
        b"A" * 70_000 + b": b\r\n",
    ),
    *(b"Origin: http://evil.example\r\n", b"Authorization: Bearer \xff\r\n", b"X: \xf0\x28\x8c\x28\r\n", b"{" * 500),
)


def noise(rng: random.Random) -> bytes:
    """Return the beginning, the middle or the whole of a request, with parts that do not belong together."""
    text = b"".join(rng.choices(PARTS, k=rng.randint(1, 6)))
    if rng.random() < 0.3:
        position = rng.randrange(len(text))
        text = text[:position] + rng.randbytes(rng.randint(0, 8)) + text[position + 1 :]
    return text


def send_noise(port: int, count: int, seed: int = SEED) -> None:
    """Send so many requests of noise, each on its own connection, and wait for no answer."""
    rng = random.Random(seed)
    for _ in range(count):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as connection:
            connection.sendall(noise(rng))


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    folder = tmp_path_factory.mktemp("hostile")
    model = write_gguf(folder / "tiny.gguf", tiny("llama"), "Q8_0")
    with running(folder, **IMPATIENT | {"model": model, "stall_timeout": 30, "probe_interval": 2}) as started:
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


COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.slow("a minute or two: 100,000 malformed requests"))]


@pytest.mark.parametrize("count", COUNTS)
def test_noise_to_the_agent(instance: Instance, count: int) -> None:
    port = instance.settings["agent_port"]
    for part in range(10):
        send_noise(port, count // 10, SEED + part)
        assert answers(port, "/livez")
    assert instance.health()["state"] in {"ready", "busy"}


@pytest.mark.parametrize("count", COUNTS)
def test_noise_to_the_exporter(exporter: int, count: int) -> None:
    for part in range(10):
        send_noise(exporter, count // 10, SEED + part)
        assert answers(exporter, "/livez")


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


@pytest.fixture(scope="module")
def interface(instance: Instance) -> dict[str, Any]:
    found: dict[str, Any] = instance.agent("/openapi.json").json
    return found


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#?"), max_size=20)
HEADERS = st.dictionaries(
    st.sampled_from(["Accept", "Range", "If-Match", "Content-Type", "X-Forwarded-Host"]), TEXTS, max_size=2
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_answer_is_one_that_the_interface_describes(
    instance: Instance, interface: dict[str, Any], data: st.DataObject
) -> None:
    """No path, method, query, header or body leads to an internal error, or to a status that nobody describes."""
    paths = interface["paths"]
    path = data.draw(st.sampled_from(sorted(paths)) | TEXTS.map(lambda text: f"/{text}"))
    method = data.draw(METHODS)
    if (path.partition("?")[0].rstrip("/") or "/") == "/drain" and method == "POST":
        return
    query = data.draw(st.sampled_from(["", "?a=1", "?%00", "?" + "x" * 500]))
    body = data.draw(st.none() | st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2))
    answer = http(
        f"http://127.0.0.1:{instance.settings['agent_port']}{path}{query}",
        None if method == "GET" else body,
        headers=data.draw(HEADERS),
        method=method,
        timeout=PATIENCE,
    )
    described = {int(status) for status in paths.get(path, {}).get(method.lower(), {}).get("responses", {})}
    assert answer.status in (described or {200, 307, 400, 403, 404, 405}), (method, path, answer)
    if answer.headers.get("content-type") == "application/json":
        json.loads(answer.body)
