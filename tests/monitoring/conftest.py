"""A monitoring stack of real programs on free loopback ports: exporter, agent, Prometheus, Alertmanager, webhook.

Host `live` is a real exporter on a fake NVML and a real agent (`pascaline serve`) over a fake engine that answers a
trickle of requests; the engine is a process on the simulated GPU, in a unit's cgroup. Host `recorded` serves pages of a
P4 and of a real SGLang.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pascaline.gpu.fake_nvml import DEMO_SCENARIO, fake_nvml_environment, write_scenario
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MONITORING = ROOT / "modules/monitoring"
PATIENCE = 120.0
"""Seconds within which a state must have come, also on a machine under load."""

INSTANCE = "demo"
UNIT = f"pascaline-{INSTANCE}.service"
FAKE_ENGINE = ROOT / "tests/fake_engine/fake_engine.py"
ENGINE_BYTES = 3 * 10**8
"""What the simulated NVML says that the engine holds on GPU 0; less than any plan."""
LIVE_SCENARIO = (
    DEMO_SCENARIO.read_text()
    + """
[gpu 0]
xid = 31
"""
)
"""The two simulated P4 of `pascaline exporter --demo`, and an Xid that a dashboard can show."""


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """The one change that rules undergo here: a minute is a second, in `for` and in windows; groups run at each tick."""
    for group in document["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+)m\]", r"[\1s]", rule["expr"])
            if "for" in rule:
                rule["for"] = re.sub(r"(\d+)m", r"\1s", rule["for"])
    return document


def wait_for(what: str, probe: Callable[[], Any]) -> Any:
    """Return the first true answer; fail with the last one after the deadline."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: last answer {answer!r}"
        time.sleep(0.1)
    return answer


def http_json(url: str) -> Any:
    """Return the answer, or None while nothing listens or it is not ready."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.loads(response.read() or b"{}")
    except (urllib.error.URLError, ConnectionError, TimeoutError, json.JSONDecodeError):
        return None


class Webhook:
    """A receiver of Alertmanager's notifications."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        received = self.alerts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait_for(self, status: str, **labels: str) -> dict[str, Any]:
        def received() -> dict[str, Any] | None:
            matching = (a for a in self.alerts if a["status"] == status and labels.items() <= a["labels"].items())
            return next(matching, None)

        found: dict[str, Any] = wait_for(f"alert {labels} {status}", received)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def post(url: str, body: dict[str, Any]) -> None:
    """Send JSON. Any answer is ignored, and so is a missing one."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(request, timeout=5) as answer:
        answer.read()


class Agent:
    """`pascaline serve` over the fake engine, as a unit would run it."""

    def __init__(self, folder: Path, programs: contextlib.ExitStack) -> None:
        self.port, self.engine_port = free_port(), free_port()
        self.log = folder / "serve.log"
        self.cgroup = programs.enter_context(unit_cgroup(UNIT))
        self._faults = folder / "engine.faults"
        settings = {
            "engine_executable": FAKE_ENGINE,
            "device": "cpu",
            "context_length": 2048,
            "port": self.engine_port,
            "agent_port": self.port,
            "cache_dir": folder / "cache",
            "probe_interval": 1,
            "stall_timeout": 3,
            "max_restarts": 1000,
        }
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "pascaline", "serve", *flags]
        if self.cgroup:
            command = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.cgroup), *command]
        environment = os.environ | {"FAKE_ENGINE_FILE": str(self._faults)}
        programs.enter_context(running(command, self.log, stdout=subprocess.DEVNULL, env=environment))
        self.wait_until_ready()

    def health(self) -> dict[str, Any]:
        return http_json(f"http://127.0.0.1:{self.port}/health") or {}

    def wait_until_ready(self) -> int:
        """Return the process of an engine that serves."""
        ready = wait_for("ready instance", lambda: (now := self.health()).get("state") in ("ready", "busy") and now)
        return int(ready["engine_pid"])

    def page(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def wait_for_page(self, wanted: Callable[[str], bool]) -> None:
        wait_for("page of the agent", lambda: wanted(self.page()))

    def inject(self, **faults: float) -> None:
        """Let the running engine misbehave."""
        post(f"http://127.0.0.1:{self.engine_port}/fake/faults", faults)

    def inject_at_start(self, faults: str) -> None:
        """Let engines misbehave that are started from now on."""
        self._faults.write_text(faults)

    def ask(self) -> None:
        """Send one request of a user, as a stream."""
        body = {"model": "any", "prompt": "Say something.", "max_tokens": 8, "stream": True}
        post(f"http://127.0.0.1:{self.engine_port}/v1/completions", body)


@contextlib.contextmanager
def unit_cgroup(unit: str) -> Iterator[Path | None]:
    """Make a cgroup as systemd does for a unit, below one of our own; None where this user may not."""
    for root in map(Path, ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")):
        parent = root / f"pascaline-tests-{os.getpid()}"
        try:
            (root / "cgroup.procs").stat()
            parent.mkdir()
            (parent / unit).mkdir()
        except OSError:
            continue
        try:
            yield parent / unit
        finally:
            for folder in (parent / unit, parent):
                wait_for(f"end of the processes in {folder}", lambda folder=folder: not _remains(folder))
        return
    yield None


def _remains(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return folder.exists()


@contextlib.contextmanager
def traffic(agent: Agent) -> Iterator[None]:
    """Send requests one after the other, some each second."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(0.2):
            agent.ask()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Stack:
    """The running programs and what a test does to them."""

    def __init__(self, folder: Path, webhook: Webhook, agent: Agent) -> None:
        self.folder = folder
        self.webhook = webhook
        self.agent = agent
        self.scenario = folder / "live.nvml"
        self.exporter: subprocess.Popen[str] | None = None
        self.exporter_port = 0
        self.prometheus = f"http://127.0.0.1:{free_port()}"
        self.alertmanager = f"http://127.0.0.1:{free_port()}"

    def fault(self, lines: str, engine_bytes: int = ENGINE_BYTES) -> None:
        """Change what the live host's NVML answers; an empty fault heals it."""
        process = f"nvmlDeviceGetComputeRunningProcesses = {self.agent.wait_until_ready()}:{engine_bytes}\n"
        write_scenario(self.scenario, LIVE_SCENARIO + process + lines)

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = http_json(f"{self.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        return answer["data"]["result"] if answer else []

    def wait_for_data(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = wait_for(f"data for {expression}", lambda: self.query(expression))
        return found

    def wait_for_rules(self) -> list[dict[str, Any]]:
        """Return the rule groups once each was evaluated."""

        def evaluated() -> list[dict[str, Any]] | None:
            answer = http_json(f"{self.prometheus}/api/v1/rules")
            groups: list[dict[str, Any]] = answer["data"]["groups"] if answer else []
            rules = [rule for group in groups for rule in group["rules"]]
            return groups if rules and all(rule["health"] != "unknown" for rule in rules) else None

        found: list[dict[str, Any]] = wait_for("evaluation of all rules", evaluated)
        return found


def prometheus_config(stack: Stack, targets: dict[str, list[tuple[int, dict[str, str]]]]) -> dict[str, Any]:
    """Return a configuration with the jobs and labels that docs/operations.md describes."""
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(stack.folder / "rules/*.yaml")],
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [stack.alertmanager.removeprefix("http://")]}]}]
        },
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": labels} for port, labels in places],
            }
            for job, places in targets.items()
        ],
    }


def alertmanager_config(webhook: Webhook) -> dict[str, Any]:
    return {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname", "host"],
            "group_wait": "1s",
            "group_interval": "1s",
            "repeat_interval": "1h",
        },
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook.url, "send_resolved": True}]}],
        "inhibit_rules": json.loads((MONITORING / "inhibit_rules.json").read_text()),
    }


def backfill(folder: Path) -> None:
    """Give the live instance two days of history, so that its baselines exist."""
    now = int(time.time())
    lines = []
    for name, value in (("instance:ttft_seconds:p90_10m", 0.8), ("instance:itl_seconds:p50_10m", 0.05)):
        lines.append(f"# TYPE {name} gauge")
        lines += [f'{name}{{host="live",name="{INSTANCE}"}} {value} {now - 300 * age}' for age in range(600, 12, -1)]
    page = folder / "history.om"
    page.write_text("\n".join([*lines, "# EOF", ""]))
    command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", page, folder / "data"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=PATIENCE)


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program while the block runs; its standard error goes to the log."""
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        if process.stdout:
            process.stdout.close()


def exporter_port(log: Path) -> int:
    def listening() -> str | None:
        found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/", log.read_text())
        return found and found[1]

    return int(wait_for("port of the exporter", listening))


def missing_programs() -> list[str]:
    alertmanager = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    return [name for name in ("prometheus", "promtool") if not shutil.which(name)] + ["alertmanager"] * (
        not alertmanager
    )


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with contextlib.ExitStack() as programs:
        yield Agent(tmp_path_factory.mktemp("agent"), programs)


@pytest.fixture(scope="module")
def stack(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not on PATH (apt install prometheus prometheus-alertmanager)")
    webhook = Webhook()
    stack = Stack(tmp_path_factory.mktemp("stack"), webhook, agent)
    with contextlib.ExitStack() as programs:
        programs.callback(webhook.close)
        programs.enter_context(traffic(agent))
        _start(stack, programs)
        yield stack


def _start(stack: Stack, programs: contextlib.ExitStack) -> None:
    stack.fault("")
    pages = [ROOT / "tests/gpu/golden/tesla-p4.prom", HERE / "pages/sglang.prom"]
    command = [sys.executable, str(HERE / "serve_pages.py"), *map(str, pages)]
    server = programs.enter_context(running(command, stack.folder / "pages.log", stdout=subprocess.PIPE))
    assert server.stdout
    gpu_port, engine_port = map(int, server.stdout.readline().split())
    live, recorded = ({"host": host, "name": INSTANCE} for host in ("live", "recorded"))
    stack.exporter_port = _start_exporter(stack, programs)
    targets = {
        "pascaline-exporter": [(stack.exporter_port, {"host": "live"}), (gpu_port, {"host": "recorded"})],
        "pascaline-agent": [(stack.agent.port, live)],
        "pascaline-engine": [(stack.agent.engine_port, live), (engine_port, recorded)],
    }
    _write_configuration(stack, targets)
    _start_alertmanager(stack, programs)
    _start_prometheus(stack, programs)


def _start_exporter(stack: Stack, programs: contextlib.ExitStack) -> int:
    command = [
        sys.executable,
        "-m",
        "pascaline",
        "exporter",
        "--port",
        "0",
        "--interval=0.5",
        "--max-age=10",
        "--deadline=2",
    ]
    log = stack.folder / "exporter.log"
    stack.exporter = programs.enter_context(running(command, log, env=fake_nvml_environment(stack.scenario)))
    return exporter_port(log)


def _write_configuration(stack: Stack, targets: dict[str, list[tuple[int, dict[str, str]]]]) -> None:
    (stack.folder / "rules").mkdir()
    for path in (MONITORING / "rules").glob("*.yaml"):
        text = yaml.safe_dump(shortened(yaml.safe_load(path.read_text())), sort_keys=False)
        (stack.folder / "rules" / path.name).write_text(text)
    (stack.folder / "prometheus.yaml").write_text(yaml.safe_dump(prometheus_config(stack, targets)))
    (stack.folder / "alertmanager.yaml").write_text(yaml.safe_dump(alertmanager_config(stack.webhook)))


def _start_alertmanager(stack: Stack, programs: contextlib.ExitStack) -> None:
    command = [
        shutil.which("prometheus-alertmanager") or "alertmanager",
        f"--config.file={stack.folder}/alertmanager.yaml",
        f"--storage.path={stack.folder}/alertmanager",
        f"--web.listen-address={stack.alertmanager.removeprefix('http://')}",
        "--cluster.listen-address=",
    ]
    programs.enter_context(running(command, stack.folder / "alertmanager.log"))
    wait_for("Alertmanager", lambda: http_json(f"{stack.alertmanager}/api/v2/status"))


def _start_prometheus(stack: Stack, programs: contextlib.ExitStack) -> None:
    backfill(stack.folder)
    command = [
        "prometheus",
        f"--config.file={stack.folder}/prometheus.yaml",
        f"--storage.tsdb.path={stack.folder}/data",
        f"--web.listen-address={stack.prometheus.removeprefix('http://')}",
    ]
    programs.enter_context(running(command, stack.folder / "prometheus.log"))
    wait_for("all targets scraped", lambda: len(stack.query("up == 1")) == 5)
