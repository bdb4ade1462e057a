"""docs/metrics.md and the code agree: every series, its type, unit, labels and meaning."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pascaline.gpu.reading import DeviceStatus, DriverStatus
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs/metrics.md").read_text()
SOURCES = ROOT / "python/pascaline/src/pascaline"
MONITORING = ROOT / "modules/monitoring"

# Endings of names and what they say of the unit.
UNITS = {
    "_bytes_per_second": "bytes/s",
    "_timestamp_seconds": "s (Unix time)",
    "_seconds": "s",
    "_bytes": "bytes",
    "_celsius": "°C",
    "_watts": "W",
    "_joules_total": "J",
    "_hertz": "Hz",
    "_ratio": "0 to 1",
    "_info": "1",
}
# The guide's names, which have no ending, and plain numbers that need a word.
NAMED_UNITS = {
    "nvidia_gpu_utilization_gpu": "percent",
    "nvidia_gpu_temperature_gpu": "°C",
    "nvidia_gpu_power_draw": "W",
    "pascaline_settings_context_length": "tokens",
    "pascaline_settings_max_total_tokens": "tokens",
    "pascaline_plan_kv_tokens": "tokens",
    "pascaline_engine_kv_tokens": "tokens",
    "pascaline_settings_max_running_requests": "requests",
}
OF_EVERY_GPU = {"gpu", "uuid"}
# Of every series of SGLang; those of a worker have the ranks too.
OF_EVERY_SGLANG_SERIES = {"engine_type", "model_name", "tp_rank", "pp_rank", "moe_ep_rank", "le"}

Row = dict[str, str]


@cache
def rows() -> dict[str, Row]:
    """Every table whose first column names a series: name -> heading -> cell."""
    found: dict[str, Row] = {}
    heading: list[str] = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        name = re.fullmatch(r"`([\w:]+)`", cells[0]) if cells else None
        if name and heading and heading[0] in ("metric", "series"):
            assert name[1] not in found, f"{name[1]} stands twice"
            found[name[1]] = dict(zip(heading, cells, strict=True))
        elif cells and not cells[0].startswith("-"):
            heading = cells
    return found


def named(prefix: str) -> dict[str, Row]:
    return {name: row for name, row in rows().items() if name.startswith(prefix)}


def codes(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def ours() -> dict[str, dict[str, Any]]:
    contracts = (ROOT / "tests/gpu/contract.json", HERE / "agent_contract.json")
    return {name: metric for path in contracts for name, metric in json.loads(path.read_text()).items()}


def unit_of(name: str) -> str:
    return NAMED_UNITS.get(name) or next((unit for end, unit in UNITS.items() if name.endswith(end)), "")


def recording_rules() -> list[str]:
    document = yaml.safe_load((MONITORING / "rules/recording.yaml").read_text())
    return [rule["record"] for group in document["groups"] for rule in group["rules"]]


def series_used(prefix: str) -> set[str]:
    """What rules, dashboards and our code ask an engine for; of a histogram, its name."""
    files = [*MONITORING.rglob("rules/*.yaml"), *MONITORING.rglob("*.json"), *SOURCES.rglob("*.py")]
    texts = [path.read_text() for path in files]
    return {re.sub(r"_(bucket|sum|count)$", "", name) for text in texts for name in re.findall(rf"{prefix}:\w+", text)}


def test_every_series_of_ours_is_on_the_page_and_no_other() -> None:
    assert set(named("nvidia_gpu_") | named("pascaline_")) == set(ours())


@pytest.mark.parametrize("name", sorted(ours()))
def test_type_unit_labels_and_meaning_are_those_of_the_code(name: str) -> None:
    row, metric = rows()[name], ours()[name]
    assert row["type"] == metric["type"]
    assert row["unit"] == unit_of(name)
    assert row["meaning"] == metric["help"]
    expected = set(metric["labels"]) - (OF_EVERY_GPU if name.startswith("nvidia_gpu_") else set())
    assert set(codes(row["labels"])) == expected


def test_every_state_of_the_driver_and_of_a_gpu_is_in_the_table_of_failures() -> None:
    table = PAGE.partition("### When something fails")[2].partition("\n### ")[0]
    assert [status for status in DriverStatus if f"| `{status}` |" not in table] == []
    told = set(re.findall(r'nvidia_gpu_device_status\{status="(\w+)"\}', table))
    assert told == set(DeviceStatus) - {DeviceStatus.OK}


def test_every_series_of_sglang_that_is_used_is_on_the_page_as_sglang_emits_it() -> None:
    emitted = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families((HERE / "pages/sglang.prom").read_text())
    }
    assert set(named("sglang:")) == series_used("sglang")
    for name, row in named("sglang:").items():
        labels = {label for sample in emitted[name].samples for label in sample.labels}
        assert row["type"] == emitted[name].type, name
        assert set(codes(row["labels"])) == labels - OF_EVERY_SGLANG_SERIES, name


def test_every_series_of_llama_cpp_that_is_used_is_on_the_page() -> None:
    # The engine's reader puts its prefix before each name.
    engine = (SOURCES / "engines/llama_cpp/engine.py").read_text()
    read = {f"llamacpp:{name}" for name in re.findall(r'"(\w+_total)"', engine)}
    assert set(named("llamacpp:")) == series_used("llamacpp") | read


def test_every_series_of_the_plugin_is_on_the_page() -> None:
    counters = (SOURCES.parents[2] / "sglang-pascal/src/sglang_pascal/speculation/counters.py").read_text()
    assert set(named("sglang_pascal:")) == set(re.findall(r'"(sglang_pascal:\w+)"', counters))


def test_every_recording_rule_is_on_the_page() -> None:
    assert {
        name for name in rows() if ":" in name and not name.startswith(("sglang:", "sglang_pascal:", "llamacpp:"))
    } == set(recording_rules())


@pytest.mark.parametrize("label", ["state", "reason", "cause", "stage"])
def test_the_values_of_the_agents_labels_are_those_of_a_running_one(label: str, agent: Any) -> None:
    lines = [line for line in PAGE.partition("## Agent: instance")[2].splitlines() if f"`{label}`: " in line]
    (listed,) = [part for line in lines for part in re.findall(rf"`{label}`: ([^;.]+)", line)]
    found = {
        sample.labels[label]
        for family in text_string_to_metric_families(agent.page())
        for sample in family.samples
        if label in sample.labels
    }
    assert set(codes(listed)) == found


def test_the_links_of_the_page_lead_to_its_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
