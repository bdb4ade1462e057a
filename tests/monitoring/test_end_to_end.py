"""A fault in a real process reaches a real webhook through Prometheus and Alertmanager, and so does its end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

INSTANCE = "demo"
ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "modules/monitoring/dashboards").glob("*.json"))

pytestmark = pytest.mark.monitoring


def test_prometheus_evaluates_every_rule_without_an_error(stack: Any) -> None:
    groups = stack.wait_for_rules()
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) > 40


def test_a_lost_gpu_reaches_the_webhook_and_resolves_when_it_is_back(stack: Any) -> None:
    stack.fault("[gpu 1]\nall = error GPU_IS_LOST\n")
    labels = {"alertname": "GpuLost", "host": "live", "gpu": "1", "severity": "critical"}
    fired = stack.webhook.wait_for("firing", **labels)
    stack.fault("")
    stack.webhook.wait_for("resolved", **labels)
    assert fired["annotations"]["summary"] == "GPU 1 of live no longer answers its driver"
    assert fired["annotations"]["runbook_url"] == "docs/operations.md#gpulost"


@pytest.mark.slow("waits for an alert's time")
def test_a_driver_that_hangs_reaches_the_webhook_and_resolves_when_it_answers(stack: Any) -> None:
    stack.fault("[library]\nall = hang\n")
    labels = {"alertname": "ExporterStale", "host": "live", "severity": "warning"}
    fired = stack.webhook.wait_for("firing", **labels)
    stack.fault("")
    stack.webhook.wait_for("resolved", **labels)
    assert fired["annotations"]["summary"] == "the exporter of live gets no readings from the driver"


def test_an_exporter_that_does_not_answer_reaches_the_webhook_and_resolves_when_it_does(stack: Any) -> None:
    stack.exporter.send_signal(signal.SIGSTOP)
    try:
        labels = {"alertname": "ExporterDown", "host": "live", "severity": "critical"}
        fired = stack.webhook.wait_for("firing", **labels)
    finally:
        stack.exporter.send_signal(signal.SIGCONT)
    stack.webhook.wait_for("resolved", **labels)
    assert fired["annotations"]["summary"] == "the GPU exporter of live does not answer"


def test_an_engine_that_cannot_start_again_reaches_the_webhook_and_resolves_when_it_can(stack: Any) -> None:
    stack.agent.inject_at_start("load_error=out-of-memory")
    stack.agent.inject(crash_now=1)
    labels = {"alertname": "EngineDown", "host": "live", "name": INSTANCE, "severity": "critical"}
    fired = stack.webhook.wait_for("firing", **labels)
    stack.agent.inject_at_start("")
    stack.webhook.wait_for("resolved", **labels)
    assert fired["annotations"]["summary"] == "demo on live has no running engine"


def test_an_engine_that_stands_still_reaches_the_webhook_and_resolves_when_it_was_restarted(stack: Any) -> None:
    stack.agent.wait_until_ready()
    stack.agent.inject(hang=1)
    labels = {"alertname": "EngineUnresponsive", "host": "live", "name": INSTANCE, "severity": "critical"}
    fired = stack.webhook.wait_for("firing", **labels)
    stack.webhook.wait_for("resolved", **labels)
    stack.agent.wait_until_ready()
    assert fired["annotations"]["summary"] == "demo on live accepted requests but made no progress"


def test_an_engine_that_outgrows_its_plan_reaches_the_webhook_and_resolves_when_it_shrinks(stack: Any) -> None:
    need_unit(stack)
    stack.fault("", engine_bytes=7 * 10**9)
    labels = {"alertname": "PlanExceeded", "host": "live", "name": INSTANCE, "severity": "warning"}
    fired = stack.webhook.wait_for("firing", **labels)
    stack.fault("")
    stack.webhook.wait_for("resolved", **labels)
    assert fired["annotations"]["summary"] == "demo on live holds more GPU memory than its plan says"


def need_unit(stack: Any) -> None:
    if stack.agent.cgroup is None:
        pytest.skip("this user may not make a cgroup, so no process can be in a unit")


def queries() -> Iterator[Any]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "30s").replace("$name", ".*")
                # An instance is the live one: its agent, engine, GPU and plan must all meet in one query.
                expression = expression.replace("$host", "live" if path.stem == "instance" else ".*")
                yield pytest.param(expression, id=f"{path.stem}: {panel['title']} {target['refId']}")


@pytest.mark.parametrize("expression", list(queries()))
def test_every_query_of_every_panel_returns_data(expression: str, stack: Any) -> None:
    """With variables as Grafana fills them in, and the window of rates as for a scrape each second."""
    need_unit(stack)
    # Other tests restart the engine, whose process the simulated driver must name.
    stack.fault("")
    assert "$" not in expression
    stack.wait_for_data(expression)


@pytest.mark.parametrize(
    "rule",
    [
        *("instance:generated_tokens:rate5m", "instance:prompt_tokens:rate5m", "instance:running_requests:sum"),
        *("instance:queued_requests:sum", "instance:ttft_seconds:p90_10m", "instance:itl_seconds:p50_10m"),
    ],
)
def test_the_page_of_a_real_sglang_feeds_every_rule_that_reads_an_engine(rule: str, stack: Any) -> None:
    stack.wait_for_data(f'{rule}{{host="recorded", name="{INSTANCE}"}}')


def test_top_shows_what_prometheus_has(stack: Any) -> None:
    need_unit(stack)
    stack.fault("")
    (held,) = stack.wait_for_data(f'instance:gpu_memory_bytes:sum{{host="live", name="{INSTANCE}"}}')
    (planned,) = stack.query('pascaline_plan_total_bytes{host="live"}')
    host = f"127.0.0.1:{stack.agent.port}"
    command = [sys.executable, "-m", "pascaline", "top", "--json", "--host", host]
    command += ["--exporter-port", str(stack.exporter_port)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (reading,) = json.loads(done.stdout)
    (instance,) = reading["instances"]
    assert [gpu["name"] for gpu in reading["gpus"]] == ["Tesla P4", "Tesla P4"]
    assert (instance["name"], instance["state"]) in ((INSTANCE, "ready"), (INSTANCE, "busy"))
    assert instance["planned_bytes"] == float(planned["value"][1])
    assert instance["actual_bytes"] == float(held["value"][1])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_of_a_dashboard_has_values(path: Path, stack: Any) -> None:
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found
            series = stack.wait_for_data(found[1].replace("$host", ".*"))
            assert all(found[2] in one["metric"] for one in series)
