"""No secret leaves an instance: all that it ever wrote, answered or sent is searched for every form of them."""

from __future__ import annotations

import json
import urllib.parse
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pascaline.errors import ExitCode
from pascaline.redaction import HIDDEN, SHORTEST_PART
from support.instance import http, wait_until
from support.manager import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.instance import Instance

    Serve = Callable[..., Instance]

KEY, ADMIN_KEY, TOKEN = "sk/Ab+1&\"'=0123456789", "admin-0123456789abcdef", "hf_0123456789abcdefghij"
PAGES = ("/health", "/readyz", "/livez", "/metrics", "/plan", "/openapi.json", "/docs", "/nowhere")
WORDS = {
    "as it is": KEY,
    "SGLang's arguments": f"[2026-01-01 00:00:00] server_args={ {'api_key': KEY, 'admin_api_key': ADMIN_KEY} }",
    "JSON": f"RuntimeError: refused {json.dumps({'key': KEY})}",
    "an address": f"RuntimeError: GET /v1?key={urllib.parse.quote(KEY, safe='')}",
    "a header": f"RuntimeError: {b'authorization'} {f'Bearer {KEY}'.encode()!r}",
    "two lines": f"RuntimeError: refused {KEY[:12]}\n  {KEY[12:]}",
    "a line of two pieces": "x" * (64 * 1024 - 9) + KEY + " end",
}
FAST = {"SGLang's arguments", "two lines", "a line of two pieces"}
SLOW = pytest.mark.slow("repeats with other words how an engine's last ones are shown")
"""Every form of a secret in a line is tested in python/pascaline/tests/test_redaction.py."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    told = ServiceManager(str(tmp_path / "notify"))
    yield told
    told.close()


@pytest.fixture
def secretive(serve: Serve, tmp_path: Path, manager: ServiceManager) -> Callable[..., Instance]:
    """Start an instance that knows three secrets."""
    key = tmp_path / "secrets" / "key"
    key.parent.mkdir()
    key.write_text(f"{KEY}\n", encoding="utf-8")
    (tmp_path / "runtime").mkdir()
    environment = {"HF_TOKEN": TOKEN, "NOTIFY_SOCKET": str(tmp_path / "notify"), "TMPDIR": str(tmp_path / "runtime")}

    def start(**settings: Any) -> Instance:
        extra = {"api_key_file": key, "extra_args": [f"--admin-api-key={ADMIN_KEY}"]}
        return serve(**extra, environment=environment, **settings)

    return start


def forms() -> list[str]:
    """Every part of a secret of some length, in the forms that matter most."""
    found = []
    for secret in (KEY, ADMIN_KEY, TOKEN):
        whole = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], urllib.parse.quote(secret, safe="")}
        found += [form[n : n + SHORTEST_PART] for form in whole for n in range(len(form) - SHORTEST_PART + 1)]
    return found


def assert_in_none(texts: dict[str, str]) -> None:
    shown = {name: form for name, text in texts.items() for form in forms() if form in text}
    assert shown == {}


def pages_of(instance: Instance) -> dict[str, str]:
    return {path: instance.agent(path).text for path in PAGES}


def files_of(folder: Path) -> dict[str, str]:
    """Everything in the cache; the configuration file of the engine is the place where the key may be."""
    return {str(path): path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [words if words in FAST else pytest.param(words, marks=SLOW) for words in WORDS])
def test_what_an_engine_says_when_it_crashes(
    secretive: Callable[..., Instance], manager: ServiceManager, words: str, tmp_path: Path
) -> None:
    instance = secretive(max_restarts=1)
    instance.wait_for_state("ready")
    headers = {"Authorization": f"Bearer {KEY}"}
    instance.fault(words=WORDS[words], error_status=500)
    assert instance.api("/v1/completions", {}, headers=headers).status == 500
    wait_until("a failed test generation", lambda: not instance.health()["last_probe"]["ok"])
    before = pages_of(instance)
    instance.fault(crash_now=1)
    instance.wait_for_state("restarting")
    after = pages_of(instance)
    instance.wait_for_state("ready")
    instance.fault(crash_now=1)
    assert instance.wait() == ExitCode.GAVE_UP
    assert HIDDEN in instance.text
    assert_in_none(before | after | {"log": instance.text, "status": "\n".join(manager.messages)})
    assert_in_none(files_of(tmp_path / "cache"))


def test_a_failed_start_and_the_processes(secretive: Callable[..., Instance]) -> None:
    instance = secretive()
    pid = instance.wait_for_state("ready")["engine_pid"]
    process = psutil.Process(pid)
    assert KEY not in " ".join(process.cmdline())
    assert "HF_TOKEN" not in process.environ()
    headers = {"Authorization": f"Bearer {KEY}"}
    assert http(f"{instance.api_url}/v1/models", headers=headers).status == 200
    assert instance.stop() == ExitCode.OK
    assert_in_none({"log": instance.text})
    assert f"'api_key': {HIDDEN}" in instance.text


def test_a_configuration_that_is_refused(serve: Serve) -> None:
    instance = serve(port="hf_0123456789abcdefghij", environment={"HF_TOKEN": TOKEN})
    assert instance.wait() == ExitCode.CONFIGURATION
    assert_in_none({"log": instance.text})
