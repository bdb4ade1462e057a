"""The agent's interface, what the engine is given, and what a service manager receives."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pascaline import __version__
from pascaline.errors import ExitCode
from pascaline.serving.health import State
from prometheus_client.parser import text_string_to_metric_families
from support.instance import wait_until
from support.manager import ServiceManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.instance import Instance

    Serve = Callable[..., Instance]

CONTRACT = json.loads((Path(__file__).parents[1] / "monitoring/agent_contract.json").read_text())


class TestInterface:
    def test_health_says_everything(self, serve: Serve, model: Path) -> None:
        instance = serve(served_model_name="emily")
        before = time.time()
        instance.wait_for_state("ready")
        report = wait_until("the engine's version", lambda: _with_version(instance))
        assert before - 5 < report.pop("since") < time.time()
        probe = report.pop("last_probe")
        assert probe.pop("at") < time.time()
        assert probe.pop("seconds") > 0
        assert probe == {"ok": True, "reason": None}
        assert psutil.Process(report.pop("engine_pid")).ppid() == instance.process.pid
        assert len(report["model"].pop("sha256")) == 64
        assert report == {
            "state": "ready",
            "reason": "a generation succeeded",
            "engine": "sglang",
            "role": "generate",
            "parsers": {"tool_call_parser": None, "reasoning_parser": None},
            "running_requests": 0,
            "queued_requests": 0,
            "restarts": 0,
            "model": {"name": "emily", "path": str(model), "architecture": "llama"},
            "versions": {"pascaline": __version__, "sglang": "0.5.23"},
        }

    def test_verdicts(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        assert instance.agent("/livez").json == {"ok": True, "state": "ready", "reason": "the supervisor answers"}
        answer = instance.agent("/readyz")
        assert (answer.status, answer.json) == (
            200,
            {"ok": True, "state": "ready", "reason": "a generation succeeded"},
        )
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.agent("/livez").status == 200
        answer = instance.agent("/readyz")
        assert (answer.status, answer.json) == (
            503,
            {
                "ok": False,
                "state": "restarting",
                "reason": "the engine ended with signal SIGKILL: RuntimeError: the fake engine was told to crash",
            },
        )

    def test_drain_lets_requests_end_and_ends_the_instance(self, serve: Serve) -> None:
        instance = serve(faults="decode_tokens_per_second=20")
        instance.wait_for_state("ready")
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(instance.complete, max_tokens=40)
            instance.wait_for_state("busy")
            # Twice, as a client that repeats what it is not sure of, and SIGTERM after it, as a service manager.
            for _ in range(2):
                drained = instance.agent("/drain", {})
                assert (drained.status, drained.json) == (
                    202,
                    {"ok": True, "state": "draining", "reason": "draining"},
                )
            wait_until("the number of requests", lambda: instance.health()["running_requests"] == 1)
            refused = instance.complete()
            assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
            instance.process.terminate()
            assert answer.result().json["usage"]["completion_tokens"] == 40
        assert instance.wait() == ExitCode.OK

    def test_drain_wants_the_key_or_the_unix_socket(self, serve: Serve, tmp_path: Path) -> None:
        key, folder = tmp_path / "key", tmp_path / "run"
        key.write_text("sesame-open")
        folder.mkdir()
        instance = serve(api_key_file=key, environment={"RUNTIME_DIRECTORY": str(folder)})
        instance.wait_for_state("ready")
        refused = instance.agent("/drain", {})
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        bearer = {"Authorization": "Bearer sesame-open"}
        assert instance.agent("/drain", {}, headers=bearer | {"Origin": "http://evil.example.org"}).status == 403
        assert instance.agent("/drain", {}, headers=bearer | {"Host": "evil.example.org"}).status == 403
        assert instance.agent("/health").json["state"] == "ready"
        with socket.socket(socket.AF_UNIX) as connection:
            assert stat.S_IMODE((folder / "agent.sock").stat().st_mode) == 0o600
            connection.settimeout(10)
            connection.connect(str(folder / "agent.sock"))
            connection.sendall(b"POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 202 ")
        assert instance.wait() == ExitCode.OK

    def test_one_folder_serves_one_instance(self, serve: Serve, tmp_path: Path) -> None:
        """A second instance leaves the first one's socket alone; after a SIGKILL the next one takes it over."""
        folder = tmp_path / "run"
        folder.mkdir()
        given = {"RUNTIME_DIRECTORY": str(folder)}
        first = serve(environment=given)
        first.wait_for_state("ready")
        second = serve(environment=given)
        assert second.wait() == ExitCode.PORT_IN_USE
        assert f"RUNTIME_DIRECTORY: {folder} is in use by " in second.error
        assert f"(pid {first.process.pid}); stop that process" in second.error
        assert answers(folder / "agent.sock")
        first.process.kill()
        first.wait()
        assert not answers(folder / "agent.sock")
        third = serve(environment=given)
        third.wait_for_state("ready")
        assert answers(folder / "agent.sock")
        assert third.stop() == ExitCode.OK

    def test_drain_takes_no_get(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        assert instance.agent("/drain").status == 405
        assert instance.health()["state"] == "ready"

    def test_openapi_describes_every_path(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("starting", "ready")
        description = instance.agent("/openapi.json").json
        assert set(description["paths"]) == {"/livez", "/readyz", "/health", "/metrics", "/plan", "/drain"}
        for path in description["paths"].values():
            assert all(operation["summary"] for operation in path.values())
        assert set(description["paths"]["/readyz"]["get"]["responses"]) == {"200", "503"}
        fields = description["components"]["schemas"]["HealthReport"]["properties"]
        assert set(fields) == set(instance.health())
        assert instance.agent("/openapi.json").status == 200
        assert instance.agent("/docs").status == 404, "its page would load scripts from another server"

    def test_plan_is_what_the_engine_was_given(self, serve: Serve) -> None:
        instance = serve(context_length=512, max_running_requests=3)
        instance.wait_for_state("ready")
        plan = instance.agent("/plan").json
        engine = instance.api("/server_info").json
        assert plan["context_length"] == engine["context_length"] == 512
        assert plan["kv_tokens"] == engine["max_total_tokens"]
        assert engine["max_running_requests"] == 3

    def test_the_agent_answers_while_the_engine_loads(self, serve: Serve) -> None:
        instance = serve(faults="start_seconds=600")
        report = instance.wait_for_state("starting")
        assert report["reason"] == "the engine is loading"
        assert instance.agent("/readyz").status == 503
        assert instance.metric('pascaline_instance_state{state="starting"}') == 1


class TestMetrics:
    def test_the_page_is_valid_and_keeps_the_contract(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        # What the engine says of itself is asked for once it is ready.
        instance.wait_for_line("is ready after")
        answer = instance.agent("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        kinds = {
            name: (family.type, set(sample.labels))
            for family in families.values()
            for sample in family.samples
            for name in (family.name, sample.name)
        }
        for name, metric in CONTRACT.items():
            assert name in kinds, f"{name} is in the contract and not on the page"
            kind, labels = kinds[name]
            assert kind == metric["type"], name
            assert set(metric["labels"]) <= labels, name
        assert all(family.documentation for family in families.values())

    def test_one_state_holds(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        states = {state: instance.metric(f'pascaline_instance_state{{state="{state}"}}') for state in State}
        assert states == {state: float(state is State.READY) for state in State}

    def test_values_follow_what_happens(self, serve: Serve) -> None:
        instance = serve()
        instance.wait_for_state("ready")
        assert instance.metric("pascaline_engine_up") == 1
        assert instance.metric("pascaline_probe_seconds_count") >= 1
        last = instance.metric("pascaline_last_successful_generation_timestamp_seconds")
        wait_until(
            "a later generation",
            lambda: instance.metric("pascaline_last_successful_generation_timestamp_seconds") > last,
        )
        instance.fault(crash_now=1)
        instance.wait_for_state("restarting")
        assert instance.metric("pascaline_engine_up") == 0
        reasons = ("crash", "unresponsive", "gpu-lost")
        restarts = [instance.metric(f'pascaline_engine_restarts_total{{reason="{reason}"}}') for reason in reasons]
        assert restarts == [1, 0, 0]


class TestEngine:
    """What reaches the engine's process."""

    def test_its_variables(self, serve: Serve) -> None:
        instance = serve(environment={"PASCALINE_ENVIRONMENT": "EXTRA=1"}, threads=1)
        pid = instance.wait_for_state("ready")["engine_pid"]
        environment = psutil.Process(pid).environ()
        wanted = {
            "SGLANG_PLATFORM": "pascal",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "EXTRA": "1",
        }
        assert {name: environment.get(name) for name in wanted} == wanted

    def test_debug_switches_on_what_finds_errors(self, serve: Serve) -> None:
        instance = serve(debug=True)
        process = psutil.Process(instance.wait_for_state("ready")["engine_pid"])
        assert process.environ()["CUDA_LAUNCH_BLOCKING"] == "1"
        assert process.cmdline()[-2:] == ["--log-level", "debug"]

    def test_the_api_key_is_asked_for_and_never_shown(self, serve: Serve, tmp_path: Path) -> None:
        key = tmp_path / "key"
        key.write_text("sesame-open\n")
        instance = serve(api_key_file=key, environment={"TMPDIR": str(tmp_path)})
        pid = instance.wait_for_state("ready")["engine_pid"]
        assert instance.complete().status == 401
        assert instance.complete(headers={"Authorization": "Bearer sesame-open"}).status == 200
        [config] = tmp_path.glob("pascaline-*/sglang.yaml")
        assert stat.S_IMODE(config.stat().st_mode) == 0o600
        assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
        assert "sesame" not in " ".join(psutil.Process(pid).cmdline())
        pages = [instance.agent(path).text for path in ("/health", "/metrics", "/plan")]
        assert "sesame" not in "".join(pages)
        assert instance.stop() == ExitCode.OK
        assert "sesame" not in instance.text

    def test_it_leads_a_group_of_its_own(self, serve: Serve) -> None:
        instance = serve()
        pid = instance.wait_for_state("ready")["engine_pid"]
        assert os.getpgid(pid) == os.getsid(pid) == pid
        assert {os.getpgid(process.pid) for process in instance.descendants()} == {pid}


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServiceManager, dict[str, str]]]:
    """A service manager, and the variables by which a service finds it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@pascaline-{os.getpid()}-{tmp_path.name}"
    service_manager = ServiceManager(address)
    yield service_manager, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000000"}
    service_manager.close()


class TestServiceManager:
    def test_what_it_is_told_and_when(self, serve: Serve, manager: tuple[ServiceManager, dict[str, str]]) -> None:
        told, environment = manager
        instance = serve(environment=environment, faults="start_seconds=1")
        instance.wait_for_state("ready")
        wait_until("READY", lambda: "READY=1" in told.messages)
        known = len(told.messages)
        wait_until("signs of life while ready", lambda: told.messages[known:].count("WATCHDOG=1") > 3)
        assert instance.stop() == ExitCode.OK
        messages = list(told.messages)
        order = [message for message in messages if not message.startswith(("WATCHDOG", "EXTEND"))]
        assert order == [
            "STATUS=starting: the engine is loading",
            "STATUS=ready: a generation succeeded",
            "READY=1",
            "STATUS=draining: SIGTERM",
            "STOPPING=1",
            "STATUS=stopped: stopped",
        ]
        ready, stopping = messages.index("READY=1"), messages.index("STOPPING=1")
        extensions = [index for index, message in enumerate(messages) if message == "EXTEND_TIMEOUT_USEC=30000000"]
        assert any(index < ready for index in extensions)
        assert any(index > stopping for index in extensions)
        assert not any(ready < index < stopping for index in extensions)

    def test_it_is_not_told_by_the_engine(self, serve: Serve, manager: tuple[ServiceManager, dict[str, str]]) -> None:
        _, environment = manager
        instance = serve(environment=environment)
        pid = instance.wait_for_state("ready")["engine_pid"]
        assert not environment.keys() & psutil.Process(pid).environ().keys()

    def test_the_watchdog_is_fed_while_the_engine_hangs(
        self, serve: Serve, manager: tuple[ServiceManager, dict[str, str]]
    ) -> None:
        told, environment = manager
        instance = serve(environment=environment)
        instance.wait_for_state("ready")
        instance.fault(mute=1)
        gaps: list[float] = []
        seen, last = len(told.messages), time.monotonic()
        while instance.health().get("state") != "restarting":
            if "WATCHDOG=1" in told.messages[seen:]:
                gaps.append(time.monotonic() - last)
                seen, last = len(told.messages), time.monotonic()
            time.sleep(0.05)
        assert gaps
        # Half of WATCHDOG_USEC is what a service should keep.
        assert max(gaps) < 5

    def test_one_that_does_not_read_holds_nothing_up(self, serve: Serve, tmp_path: Path) -> None:
        address = str(tmp_path / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
            deaf.bind(address)
            instance = serve(environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000000"})
            instance.wait_for_state("ready")
            assert instance.stop() == ExitCode.OK


def _with_version(instance: Instance) -> dict[str, Any] | None:
    report = instance.health()
    # Both come with the first page of metrics after the engine is ready.
    whole = "sglang" in report.get("versions", {}) and report["running_requests"] is not None
    return report if whole else None


def answers(path: Path) -> bool:
    """Whether an agent answers on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        try:
            connection.connect(str(path))
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False
