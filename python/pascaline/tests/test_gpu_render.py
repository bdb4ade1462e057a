"""The page: well-formed for any answer of a driver, without series for absent values, and with the right units."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pascaline.gpu.metrics import DEVICE_CALLS, FAMILIES
from pascaline.gpu.processes import ProcessIdentity, identify, unit_of
from pascaline.gpu.reading import DeviceReading, DeviceStatus, DriverStatus, Reading, XidCount
from pascaline.gpu.render import metric_catalogue, render, to_json
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from pathlib import Path

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def nobody(pid: int) -> ProcessIdentity:
    return ProcessIdentity()


def parsed(page: str) -> Samples:
    """Return every sample by name and labels; a repeated one is an error, as it is to Prometheus."""
    found: Samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"twice on one page: {key}"
            found[key] = sample.value
    return found


def reading_of(**values: Any) -> Reading:
    device = DeviceReading(0, "GPU-a", DeviceStatus.OK, values={key.replace("__", " "): v for key, v in values.items()})
    return Reading(DriverStatus.OK, devices=(device,), counted=1, last_success_timestamp=1.0)


def value_of(reading: Reading, name: str, **labels: str) -> float | None:
    key = (f"nvidia_gpu_{name}", frozenset({"gpu": "0", "uuid": "GPU-a", **labels}.items()))
    return parsed(render(reading, nobody)).get(key)


@pytest.mark.parametrize(
    ("answer", "name", "labels", "wanted"),
    [
        ({"nvmlDeviceGetPowerUsage": 74210}, "power_draw", {}, 74.21),
        ({"nvmlDeviceGetUtilizationRates": [98, 71]}, "utilization_gpu", {}, 98),
        ({"nvmlDeviceGetUtilizationRates": [98, 71]}, "memory_bus_utilization_ratio", {}, 0.71),
        ({"nvmlDeviceGetClockInfo__2": 3003}, "clock_hertz", {"clock": "memory"}, 3.003e9),
        (
            {"nvmlDeviceGetPcieThroughput__1": 31000},
            "pcie_throughput_bytes_per_second",
            {"direction": "receive"},
            3.1e7,
        ),
        ({"nvmlDeviceGetTotalEnergyConsumption": 1500}, "energy_joules_total", {}, 1.5),
        ({"nvmlDeviceGetFanSpeed": 45}, "fan_speed_ratio", {}, 0.45),
        ({"nvmlDeviceGetPerformanceState": 0}, "performance_state", {}, 0),
        ({"nvmlDeviceGetPerformanceState": 15}, "performance_state", {}, 15),
        ({"nvmlDeviceGetPerformanceState": 32}, "performance_state", {}, None),
        ({"nvmlDeviceGetRetiredPages__1": []}, "retired_pages", {"cause": "double_bit"}, 0),
        ({"nvmlDeviceGetRetiredPages__1": [4096, 8192]}, "retired_pages", {"cause": "double_bit"}, 2),
        ({"nvmlDeviceGetMemoryInfo": [9, 5, 4]}, "memory_used_bytes", {}, 4),
        ({"nvmlDeviceGetMemoryInfo": [9, 5, 4]}, "memory_reserved_bytes", {}, None),
        (
            {"nvmlDeviceGetMemoryInfo": [9, 5, 4], "nvmlDeviceGetMemoryInfo_v2": [9, 1, 5, 3]},
            "memory_used_bytes",
            {},
            3,
        ),
        ({"nvmlDeviceGetMemoryInfo_v2": [9, 1, 5, 3]}, "memory_free_bytes", {}, 5),
        ({}, "memory_used_bytes", {}, None),
        ({}, "temperature_gpu", {}, None),
    ],
)
def test_an_answer_becomes_a_value_in_the_base_unit_or_nothing(
    answer: dict[str, Any], name: str, labels: dict[str, str], wanted: float | None
) -> None:
    assert value_of(reading_of(**answer), name, **labels) == wanted


@pytest.mark.parametrize(
    ("active", "supported", "reason", "wanted"),
    [
        (0x4, 0x1FF, "sw_power_cap", 1),
        (0x4, 0x1FF, "hw_slowdown", 0),
        (0x4, 0x4, "hw_slowdown", None),
        (0x4, None, "hw_slowdown", 0),
        (0x100, 0x1FF, "display_clock_setting", 1),
        (0, 0x1FF, "gpu_idle", 0),
    ],
)
def test_a_throttle_reason_that_the_card_does_not_know_is_absent(
    active: int, supported: int | None, reason: str, wanted: float | None
) -> None:
    answers: dict[str, Any] = {"nvmlDeviceGetCurrentClocksThrottleReasons": active}
    if supported is not None:
        answers["nvmlDeviceGetSupportedClocksThrottleReasons"] = supported
    assert value_of(reading_of(**answers), "throttle_reason", reason=reason) == wanted


def test_a_process_in_both_lists_is_shown_once_and_one_without_bytes_not_at_all() -> None:
    reading = reading_of(
        nvmlDeviceGetComputeRunningProcesses=[[7, 100], [8, None]], nvmlDeviceGetGraphicsRunningProcesses=[[7, 100]]
    )
    page = parsed(render(reading, lambda pid: ProcessIdentity(f"p{pid}", "pascaline-a.service")))
    found = {key: value for key, value in page.items() if "process" in key[0]}
    labels = {"gpu": "0", "uuid": "GPU-a", "pid": "7", "process": "p7", "unit": "pascaline-a.service"}
    assert found == {("nvidia_gpu_process_memory_used_bytes", frozenset(labels.items())): 100}


@pytest.mark.parametrize("status", [status for status in DriverStatus if status not in ("ok", "no_devices")])
def test_a_failed_reading_has_health_and_no_data(status: DriverStatus) -> None:
    lost = DeviceReading(1, "GPU-b", DeviceStatus.HUNG, "a call hangs", values={"nvmlDeviceGetPowerUsage": 1})
    page = parsed(render(Reading(status, "reason", devices=(lost,), last_success_timestamp=5.0), nobody))
    names = {name for name, _ in page}
    assert names == {
        f"nvidia_gpu_{name}"
        for name in (
            "scrape_success",
            "last_scrape_success_timestamp_seconds",
            "driver_status",
            "reader_starts_total",
            "readers_abandoned",
            "lost",
            "device_status",
        )
    } | (set() if status is DriverStatus.STARTING else {"nvidia_gpu_scrape_duration_seconds"})
    assert page["nvidia_gpu_scrape_success", frozenset()] == 0
    assert page["nvidia_gpu_lost", frozenset({"gpu": "1", "uuid": "GPU-b"}.items())] == 1
    states = {dict(labels)["status"] for (name, labels), v in page.items() if name.endswith("driver_status") and v == 1}
    assert states == {status.value}


def test_a_driver_that_never_answered_has_no_time_of_success() -> None:
    assert "last_scrape_success" not in render(Reading(DriverStatus.NO_DRIVER), nobody)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.integers(min_value=0, max_value=2**64 - 1)
shapes = {4: 4, 3: 3, 2: 2}


def answers() -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of the calls, each with an answer of its shape."""
    return st.fixed_dictionaries({}, optional={call.key: answer_of(call) for call in DEVICE_CALLS})


def answer_of(call: Any) -> st.SearchStrategy[Any]:
    if call.fields == ("pid", "usedGpuMemory"):
        return st.lists(st.tuples(st.integers(1, 2**22), st.none() | numbers).map(list), max_size=3)
    if call.fields == ("busId",):
        return st.tuples(texts).map(list)
    if call.function in ("nvmlDeviceGetName", "nvmlDeviceGetSerial", "nvmlDeviceGetVbiosVersion"):
        return texts
    lists = {"RetiredPages": 3, "RemappedRows": 4, "Constraints": 2, "EccMode": 2, "MigMode": 2, "Capability": 2}
    size = len(call.fields) or next((n for name, n in lists.items() if call.function.endswith(name)), 0)
    return st.lists(numbers, min_size=size, max_size=size) if size else numbers


@given(answers(), texts, texts, texts)
def test_any_answers_give_a_page_that_parses_without_inventing_values(
    values: dict[str, Any], uuid: str, process: str, unit: str
) -> None:
    device = DeviceReading(3, uuid, DeviceStatus.OK, values=values)
    xid = XidCount(3, uuid, 79, 2, 1e9)
    reading = Reading(DriverStatus.OK, devices=(device,), counted=1, xids=(xid,), last_success_timestamp=1.0)
    page = parsed(render(reading, lambda pid: ProcessIdentity(process, unit)))
    catalogue = metric_catalogue()
    for (name, labels), value in page.items():
        assert set(dict(labels)) == set(catalogue[name]["labels"]), name
        assert math.isfinite(value)
        assert value >= 0
    expected = sum(sample.value(values) is not None for family in FAMILIES for sample in family.samples)
    table = {family.name for family in FAMILIES}
    assert sum(name in table for name, _ in page) == expected
    assert all(dict(labels).get("uuid", uuid) == uuid for _, labels in page)


@given(answers())
def test_text_and_json_hold_the_same_values(values: dict[str, Any]) -> None:
    device = DeviceReading(0, "GPU-a", DeviceStatus.OK, values=values)
    reading = Reading(DriverStatus.OK, devices=(device,), counted=1)
    (gpu,) = to_json(reading, nobody)["gpus"]
    flat = {
        (f"nvidia_gpu_{name}", frozenset({k: v for k, v in item.items() if k != "value"}.items())): item["value"]
        for name, series in gpu["series"].items()
        for item in (series if isinstance(series, list) else [{"value": series}])
    }
    names = {family.name for family in FAMILIES}
    ignored = {("gpu", "0"), ("uuid", "GPU-a")}
    page = {(n, labels - ignored): v for (n, labels), v in parsed(render(reading, nobody)).items() if n in names}
    assert page == pytest.approx(flat)


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/pascaline-qwen.service\n", "pascaline-qwen.service"),
        ("0::/system.slice/pascaline-qwen.service/engine\n", "pascaline-qwen.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u5.service\n", "run-u5.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        ("12:pids:/x.service\n1:name=systemd:/system.slice/ssh.service\n", "ssh.service"),
        ("0::/system.slice\n", ""),
        ("0::/\n", ""),
        ("", ""),
        ("nonsense", ""),
    ],
)
def test_the_unit_is_the_innermost_one_of_the_cgroup(cgroup: str, unit: str) -> None:
    assert unit_of(cgroup) == unit


def test_a_process_is_named_and_one_that_ended_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_text("sglang::schedul\n")
    (tmp_path / "7" / "cgroup").write_text("0::/system.slice/pascaline-a.service\n")
    assert identify(7, tmp_path) == ProcessIdentity("sglang::schedul", "pascaline-a.service")
    assert identify(8, tmp_path) == ProcessIdentity("", "")
