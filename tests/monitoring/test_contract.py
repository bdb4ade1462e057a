"""The emitted metrics are a contract: rules, dashboards and `pascaline top` query nothing else."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "modules/monitoring"
TOP = ROOT / "python/pascaline/src/pascaline/top/readings.py"
PAGES = Path(__file__).parent / "pages"
AGENT_CONTRACT = Path(__file__).parent / "agent_contract.json"

# Labels that the scrape configuration adds, and those of every series.
TARGET_LABELS = {"host", "name", "job", "instance"}
# Of Prometheus itself.
BUILT_IN = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity"}}
# llama-server, tools/server/README.md of llama.cpp: no labels.
LLAMA_CPP = (
    "prompt_tokens_total",
    "tokens_predicted_total",
    "predicted_tokens_seconds",
    "requests_processing",
    "requests_deferred",
)

SERIES = re.compile(
    r"(?<![\w:$\"])((?:nvidia_gpu_|pascaline[_:]|sglang:|llamacpp:|instance:|host:|gpu:|up\b|ALERTS\b)[\w:]*)(\{[^}]*\})?"
)


class Use(NamedTuple):
    """A series that an expression asks for."""

    series: str
    labels: frozenset[str]
    place: str


def uses_of(expression: str, place: str) -> list[Use]:
    """Return the series of a PromQL expression; text in quotes and lists of labels are no series."""
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", r"\1 ()", expression)
    found = []
    for series, selector in SERIES.findall(bare):
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", selector)
        found.append(Use(series, frozenset(labels), place))
    return found


@cache
def emitted() -> dict[str, set[str]]:
    """Every series that can be there -> its labels."""
    known = {name: set(labels) for name, labels in BUILT_IN.items()}
    gpu = json.loads((ROOT / "tests/gpu/contract.json").read_text())
    agent = json.loads(AGENT_CONTRACT.read_text())
    known |= {name: set(metric["labels"]) for name, metric in (gpu | agent).items()}
    known |= {f"llamacpp:{name}": set() for name in LLAMA_CPP}
    for family in text_string_to_metric_families((PAGES / "sglang.prom").read_text()):
        for sample in family.samples:
            # Of a histogram, code may name the whole.
            for name in (sample.name, family.name):
                known.setdefault(name, set()).update(sample.labels)
    return known | {rule["record"]: {"gpu", "uuid", "currency"} for rule in rules() if "record" in rule}


def rules() -> list[dict[str, str]]:
    documents = [yaml.safe_load(path.read_text()) for path in sorted((MONITORING / "rules").glob("*.yaml"))]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def rule_uses() -> list[Use]:
    return [use for rule in rules() for use in uses_of(rule["expr"], rule.get("alert") or rule["record"])]


def dashboard_uses() -> list[Use]:
    found = []
    for path in sorted((MONITORING / "dashboards").glob("*.json")):
        document = json.loads(path.read_text())
        expressions = [target["expr"] for panel in document["panels"] for target in panel["targets"]]
        queries = [v["query"] for v in document["templating"]["list"] if v["type"] == "query"]
        found += [use for text in (*expressions, *queries) for use in uses_of(text, f"dashboard {path.stem}")]
    return found


def top_uses() -> list[Use]:
    return [
        Use(name, frozenset(), "top")
        for name in re.findall(r'"((?:nvidia_gpu_|pascaline_|sglang:|llamacpp:)\w+)"', TOP.read_text())
    ]


@pytest.mark.parametrize(
    "use",
    sorted(
        set(rule_uses() + dashboard_uses() + top_uses()), key=lambda use: (use.place, use.series, sorted(use.labels))
    ),
    ids=lambda use: f"{use.place}: {use.series}",
)
def test_every_series_that_is_asked_for_is_emitted_with_those_labels(use: Use) -> None:
    assert use.series in emitted(), f"{use.place} asks for {use.series}, which nobody emits"
    unknown = use.labels - emitted()[use.series] - TARGET_LABELS
    assert not unknown, f"{use.place} asks for labels {sorted(unknown)} of {use.series}"


def test_names_types_help_and_labels_of_a_running_agent_are_the_contract(agent: Any) -> None:
    contract = json.loads(AGENT_CONTRACT.read_text())
    # What the engine says of its memory is asked for after the first generation.
    agent.wait_for_page(lambda page: all(f"# TYPE {name} " in page for name in contract))
    found = {}
    for family in text_string_to_metric_families(agent.page()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        found[name] = {"type": family.type, "help": family.documentation, "labels": labels}
    assert found == contract


def test_series_are_found_inside_functions_and_not_inside_label_lists() -> None:
    expression = 'sum by (host, uuid) (rate(sglang:a_total{mode="x", host=~"$host"}[5m])) / on (host) host:b:sum > 0'
    assert uses_of(expression, "here") == [
        Use("sglang:a_total", frozenset({"mode", "host"}), "here"),
        Use("host:b:sum", frozenset(), "here"),
    ]


def test_there_is_something_to_compare() -> None:
    assert len(rule_uses()) > 60
    assert len(dashboard_uses()) > 60
    assert len(top_uses()) > 10
    assert len(emitted()) > 150
