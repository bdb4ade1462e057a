"""The alert rules as files: promtool accepts them, each alert is tested three ways and says what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "modules/monitoring/rules"
TESTS = ROOT / "tests/monitoring/promtool"
OPERATIONS = ROOT / "docs/operations.md"
SEVERITIES = {"critical", "warning", "info"}
# The labels that distinguish a rule from others of its name.
VARIANT_LABEL = "cause"

# The alerts that users of the rules rely on by name.
PROMISED = {
    *("HighVRAMUsage", "HighGPUTemp", "GpuLost", "GpuXidCritical", "GpuXidWarning", "GpuThrottled", "EccUncorrectable"),
    *("RetiredPagesPending", "PcieReplays", "ExporterDown", "ExporterStale", "EngineDown", "EngineNotReady"),
    *(
        "EngineRestarting",
        "InstanceRestartLoop",
        "EngineUnresponsive",
        "QueueGrowing",
        "KvCacheSaturated",
        "SlowFirstToken",
        "SlowDecode",
    ),
    *("SilentCpuFallback", "PlanExceeded", "FleetHostMissing", "GpuMissing"),
}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH (apt install prometheus)"
)

Rule = dict[str, Any]
AlertKey = tuple[str, str | None]


def all_rules() -> list[Rule]:
    documents = [yaml.safe_load(path.read_text()) for path in sorted(RULES.glob("*.yaml"))]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def alerts() -> list[Rule]:
    return [rule for rule in all_rules() if "alert" in rule]


def key_of(name: str, labels: dict[str, str]) -> AlertKey:
    return name, labels.get(VARIANT_LABEL)


def alert_id(rule: Rule) -> str:
    name, variant = key_of(rule["alert"], rule["labels"])
    return f"{name}-{variant}" if variant else name


def unit_tests() -> list[dict[str, Any]]:
    return [test for path in sorted(TESTS.glob("*.yaml")) for test in yaml.safe_load(path.read_text())["tests"]]


def cases_of(test: dict[str, Any]) -> dict[AlertKey, list[tuple[float, int]]]:
    """Per alert of one promtool test: (time in seconds, number of alerts expected), in order of time."""
    found: dict[AlertKey, list[tuple[float, int]]] = {}
    checks = test.get("alert_rule_test", [])
    variants = {
        label for check in checks for exp in check["exp_alerts"] if (label := exp["exp_labels"].get(VARIANT_LABEL))
    }
    for check in checks:
        key = (check["alertname"], next(iter(variants), None))
        found.setdefault(key, []).append((seconds(check["eval_time"]), len(check["exp_alerts"])))
    return {key: sorted(moments) for key, moments in found.items()}


def seconds(duration: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration))


def mirrored(target: Path, *, annotations: bool) -> Path:
    """Copy rules and tests with their relative paths; promtool compares annotations, which the tests leave out."""
    shutil.copytree(TESTS, target / TESTS.relative_to(ROOT))
    rules = target / RULES.relative_to(ROOT)
    shutil.copytree(RULES, rules)
    for path in rules.glob("*.yaml") if not annotations else ():
        document = yaml.safe_load(path.read_text())
        for rule in (rule for group in document["groups"] for rule in group["rules"]):
            rule.pop("annotations", None)
        path.write_text(yaml.safe_dump(document))
    return target / TESTS.relative_to(ROOT)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@needs_promtool
@pytest.mark.parametrize("path", sorted(RULES.glob("*.yaml")), ids=lambda path: path.stem)
def test_promtool_accepts_every_rule_file(path: Path) -> None:
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
@pytest.mark.parametrize("name", sorted(path.name for path in TESTS.glob("*.yaml")))
def test_alerts_fire_stay_silent_and_resolve_as_the_promtool_tests_say(name: str, tmp_path: Path) -> None:
    tested = promtool("test", "rules", mirrored(tmp_path, annotations=False) / name)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_promised_alert_exists() -> None:
    assert {rule["alert"] for rule in alerts()} >= PROMISED


@pytest.mark.parametrize("rule", alerts(), ids=alert_id)
def test_every_alert_is_tested_to_fire_to_be_silent_just_below_and_to_resolve(rule: Rule) -> None:
    key = key_of(rule["alert"], rule["labels"])
    tests = [(test, cases_of(test)[key]) for test in unit_tests() if key in cases_of(test)]
    assert tests, "no promtool test names this alert"
    for test, moments in tests:
        firing = [time for time, expected in moments if expected]
        assert firing, f"never expected to fire: {test['name']}"
        assert max(moments)[1] == 0, f"never expected to resolve: {test['name']}"
        assert max(moments)[0] > max(firing)
        silent_host = [series for series in test["input_series"] if 'host="below"' in series["series"]]
        assert silent_host or "without a plan" in test["name"], f"no host just below the threshold: {test['name']}"
        if rule.get("for"):
            assert min(moments)[1] == 0, f"never expected to wait for its duration: {test['name']}"


def test_no_promtool_test_names_an_alert_that_is_not_there() -> None:
    known = {key_of(rule["alert"], rule["labels"]) for rule in alerts()}
    assert {key for test in unit_tests() for key in cases_of(test)} <= known


@pytest.mark.parametrize("rule", alerts(), ids=alert_id)
def test_every_alert_says_how_bad_it_is_what_was_measured_and_what_to_do(rule: Rule) -> None:
    annotations = rule["annotations"]
    assert rule["labels"]["severity"] in SEVERITIES
    assert set(annotations) == {"summary", "description", "action", "runbook_url"}
    assert "$labels.host" in annotations["summary"]
    assert "$value" in annotations["description"]
    assert len(annotations["action"]) > 20


@pytest.mark.parametrize("rule", alerts(), ids=alert_id)
def test_every_runbook_link_points_at_a_heading_of_the_operations_manual(rule: Rule) -> None:
    page, anchor = rule["annotations"]["runbook_url"].split("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert anchor in {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_paragraph_of_the_manual_has_the_same_four_parts() -> None:
    sections = re.split(r"^### ", OPERATIONS.read_text(), flags=re.MULTILINE)[1:]
    by_name = {section.splitlines()[0]: section for section in sections}
    for name in {rule["alert"] for rule in alerts()}:
        parts = re.findall(r"^\*\*(.+?)\.\*\*", by_name[name], re.MULTILINE)
        assert parts == ["Means", "Look at", "Do", "Do not"], name


def test_every_nixos_option_that_rules_and_manual_name_exists() -> None:
    texts = [path.read_text() for path in (*RULES.glob("*.yaml"), OPERATIONS)]
    named = {option for text in texts for option in re.findall(r"(?:hardware|services)\.pascaline(?:\.\w+)+", text)}
    options = (ROOT / "docs/nixos-options.md").read_text()
    assert named
    assert {option for option in named if f"`{option}`" not in options} == set()


def test_inhibitions_name_alerts_that_exist_and_are_explained() -> None:
    inhibitions = json.loads((ROOT / "modules/monitoring/inhibit_rules.json").read_text())
    matchers = [text for rule in inhibitions for text in rule["source_matchers"] + rule["target_matchers"]]
    named = {name for text in matchers for name in re.split(r"[|\s\"=~]+", text) if name} - {"alertname"}
    assert named <= {rule["alert"] for rule in alerts()}
    sources = {rule["source_matchers"][0].removeprefix("alertname = ") for rule in inhibitions}
    assert set(re.findall(r"^\| (\w+) \| .* \| .* \|$", OPERATIONS.read_text(), re.MULTILINE)) >= sources


def test_the_two_xid_tiers_share_no_number() -> None:
    expressions = {rule["alert"]: rule["expr"] for rule in alerts()}
    critical = re.search(r'xid=~"([\d|]+)"', expressions["GpuXidCritical"])
    excluded = re.search(r'xid!~"([\d|]+)"', expressions["GpuXidWarning"])
    assert critical
    assert excluded
    assert set(critical[1].split("|")) == {"48", "62", "64", "74", "79", "95", "119", "120"}
    assert set(excluded[1].split("|")) - set(critical[1].split("|")) == {"45"}


@needs_promtool
def test_every_annotation_renders_with_its_value_and_labels(tmp_path: Path) -> None:
    """Promtool prints the annotations that it did not expect: each alert's are read from there."""
    folder = mirrored(tmp_path, annotations=True)
    printed = "".join(promtool("test", "rules", path).stderr for path in sorted(folder.glob("*.yaml")))
    rendered: dict[str, list[str]] = {}
    for labels, texts in re.findall(r"Labels:\{(.*)\}\s+Annotations:\{(.+)\}", printed):
        name = re.search(r'alertname="(\w+)"', labels)
        assert name
        rendered.setdefault(name[1], []).append(texts)
    assert set(rendered) == {rule["alert"] for rule in alerts()}
    for name, texts in rendered.items():
        for text in texts:
            assert not re.search(r"<no value>|<error|%!|\{\{| on  | of  |\bNaN\b", text), f"{name}: {text}"
            assert re.search(r'description="[^"]*\d', text), f"{name}: {text}"
