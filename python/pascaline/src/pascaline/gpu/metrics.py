"""The table of all series that the exporter emits about a GPU: NVML call -> series, unit, type, help, labels.

`nvidia_gpu_memory_used_bytes`, `_memory_total_bytes`, `_utilization_gpu` (percent), `_temperature_gpu` (Celsius) and
`_power_draw` (watts) keep the names and units that the guide's rules use; the rest has Prometheus' base units and
suffixes. A sample whose call failed is absent, never zero. Names, types and labels are a contract
(tests/gpu/contract.json): change one and dashboards and alerts break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pascaline.gpu.calls import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pascaline.gpu.calls import Raw

    Values = Mapping[str, Raw]
    Reader = Callable[[Values], float | None]

PREFIX = "nvidia_gpu_"
MetricType = Literal["gauge", "counter"]
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """One series of a family: its labels beside gpu and uuid, the calls it needs, and its value from their answers."""

    labels: Labels
    calls: tuple[Call, ...]
    value: Reader


@dataclass(frozen=True)
class Family:
    """One metric of a GPU."""

    name: str
    type: MetricType
    help: str
    samples: tuple[Sample, ...]


# ---- How a value is read from the answers ----


def _read(call: Call, item: int | None = None, scale: float = 1) -> Sample:
    """One number: the answer itself, or the item of a structure, times the factor to the base unit."""
    key = call.key

    def value(values: Values) -> float | None:
        answer: Any = values.get(key)
        if answer is None:
            return None
        number: float = answer if item is None else answer[item]
        return number * scale if isinstance(scale, int) else round(number * scale, 9)

    return Sample((), (call,), value)


def _either(first: Sample, second: Sample) -> Sample:
    """The first if the driver has it, else the second."""

    def value(values: Values) -> float | None:
        found = first.value(values)
        return second.value(values) if found is None else found

    return Sample((), first.calls + second.calls, value)


def _length(call: Call) -> Sample:
    key = call.key

    def value(values: Values) -> float | None:
        answer = values.get(key)
        return len(answer) if isinstance(answer, list) else None

    return Sample((), (call,), value)


def _bit(mask: int) -> Sample:
    """Whether a throttle reason is active; absent for reasons that the card does not know."""

    def value(values: Values) -> float | None:
        active, supported = values.get(_THROTTLE.key), values.get(_THROTTLE_SUPPORTED.key)
        if not isinstance(active, int) or (isinstance(supported, int) and not supported & mask):
            return None
        return int(bool(active & mask))

    return Sample((), (_THROTTLE, _THROTTLE_SUPPORTED), value)


def _performance_state(values: Values) -> float | None:
    state = values.get(_PERFORMANCE_STATE.key)
    # 32 is NVML_PSTATE_UNKNOWN.
    return state if isinstance(state, int) and state < 32 else None


def _labelled(sample: Sample, **labels: str) -> Sample:
    return Sample(tuple(labels.items()), sample.calls, sample.value)


def _gauge(name: str, help_text: str, *samples: Sample) -> Family:
    return Family(PREFIX + name, "gauge", help_text, samples)


def _counter(name: str, help_text: str, *samples: Sample) -> Family:
    return Family(PREFIX + name, "counter", help_text, samples)


# ---- The calls that more than one series needs ----

NAME = Call("nvmlDeviceGetName")
PCI_INFO = Call("nvmlDeviceGetPciInfo", fields=("busId",))
SERIAL = Call("nvmlDeviceGetSerial")
VBIOS = Call("nvmlDeviceGetVbiosVersion")
COMPUTE_CAPABILITY = Call("nvmlDeviceGetCudaComputeCapability")
VIRTUALIZATION = Call("nvmlDeviceGetVirtualizationMode")
VIRTUALIZATION_VGPU = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU: the answer inside a virtual machine
MIG_MODE = Call("nvmlDeviceGetMigMode")
BUS_WIDTH = Call("nvmlDeviceGetMemoryBusWidth")
"""Width of the memory bus, bits."""
CORES = Call("nvmlDeviceGetNumGpuCores")
"""CUDA cores; NVML has it since driver 455."""
COMPUTE_PROCESSES = Call("nvmlDeviceGetComputeRunningProcesses", fields=("pid", "usedGpuMemory"))
GRAPHICS_PROCESSES = Call("nvmlDeviceGetGraphicsRunningProcesses", fields=("pid", "usedGpuMemory"))
INFO_CALLS = (NAME, PCI_INFO, SERIAL, VBIOS, COMPUTE_CAPABILITY, VIRTUALIZATION)

# `used` of version 2 excludes memory reserved by the driver, as nvidia-smi does; version 1 (before 510) includes it.
_MEMORY = Call(
    "nvmlDeviceGetMemoryInfo",
    fields=("total", "reserved", "free", "used"),
    version=0x02000028,  # nvmlMemory_v2: size of the structure and version number
    alias="nvmlDeviceGetMemoryInfo_v2",
)
_MEMORY_V1 = Call("nvmlDeviceGetMemoryInfo", fields=("total", "free", "used"))
GPU_MEMORY_CALLS = ((_MEMORY, 0, 2), (_MEMORY_V1, 0, 1))
"""Calls that report a GPU's memory, the better one first, each with the positions of total and free."""
_UTILIZATION = Call("nvmlDeviceGetUtilizationRates", fields=("gpu", "memory"))
_THROTTLE = Call("nvmlDeviceGetCurrentClocksThrottleReasons")
_THROTTLE_SUPPORTED = Call("nvmlDeviceGetSupportedClocksThrottleReasons")
_PERFORMANCE_STATE = Call("nvmlDeviceGetPerformanceState")
_LIMIT_CONSTRAINTS = Call("nvmlDeviceGetPowerManagementLimitConstraints")
_ECC_MODE = Call("nvmlDeviceGetEccMode")
_REMAPPED_ROWS = Call("nvmlDeviceGetRemappedRows")

# ---- NVML's enumerations and units ----

_MILLI = 1e-3
_MEGA = 10**6
_PERCENT = 1e-2
_KILOBYTE = 1000  # of nvmlDeviceGetPcieThroughput
_NVML_FI_DEV_MEMORY_TEMP = 82
_CLOCKS = {"graphics": 0, "sm": 1, "memory": 2, "video": 3}
MAX_SM_CLOCK = Call("nvmlDeviceGetMaxClockInfo", (_CLOCKS["sm"],))
"""MHz."""
MAX_MEMORY_CLOCK = Call("nvmlDeviceGetMaxClockInfo", (_CLOCKS["memory"],))
"""MHz."""
_THRESHOLDS = {"shutdown": 0, "slowdown": 1, "memory_max": 2, "gpu_max": 3}
_THROTTLE_REASONS = {
    "gpu_idle": 0x1,
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
    "display_clock_setting": 0x100,
}
_ECC_ERRORS = {"corrected": 0, "uncorrected": 1}
_ECC_COUNTERS = {"volatile": 0, "aggregate": 1}
_ECC_LOCATIONS = {
    "l1_cache": 0,
    "l2_cache": 1,
    "device_memory": 2,
    "register_file": 3,
    "texture_memory": 4,
    "texture_shared_memory": 5,
    "control_block": 6,
    "sram": 7,
}


def _ecc_samples() -> Iterable[Sample]:
    for error, error_code in _ECC_ERRORS.items():
        for counter, counter_code in _ECC_COUNTERS.items():
            total = _read(Call("nvmlDeviceGetTotalEccErrors", (error_code, counter_code)))
            yield _labelled(total, error=error, counter=counter, location="total")
            for location, location_code in _ECC_LOCATIONS.items():
                place = _read(Call("nvmlDeviceGetMemoryErrorCounter", (error_code, counter_code, location_code)))
                yield _labelled(place, error=error, counter=counter, location=location)


def _by_clock(function: str) -> Iterable[Sample]:
    return (_labelled(_read(Call(function, (code,)), scale=_MEGA), clock=clock) for clock, code in _CLOCKS.items())


FAMILIES = (
    _gauge(
        "memory_total_bytes",
        "Memory of the card.",
        _either(_read(_MEMORY, 0), _read(_MEMORY_V1, 0)),
    ),
    _gauge(
        "memory_used_bytes",
        "Memory in use by processes (drivers before 510: and by the driver itself).",
        _either(_read(_MEMORY, 3), _read(_MEMORY_V1, 2)),
    ),
    _gauge("memory_free_bytes", "Memory that can be allocated.", _either(_read(_MEMORY, 2), _read(_MEMORY_V1, 1))),
    _gauge("memory_reserved_bytes", "Memory that the driver keeps for itself.", _read(_MEMORY, 1)),
    _gauge("utilization_gpu", "Percent of the last sample period in which a kernel ran.", _read(_UTILIZATION, 0)),
    _gauge(
        "memory_bus_utilization_ratio",
        "Share of the last sample period in which memory was read or written.",
        _read(_UTILIZATION, 1, _PERCENT),
    ),
    _gauge(
        "temperature_gpu", "Temperature of the GPU in degrees Celsius.", _read(Call("nvmlDeviceGetTemperature", (0,)))
    ),
    _gauge(
        "memory_temperature_celsius",
        "Temperature of the memory, if it has a sensor.",
        _read(Call("nvmlDeviceGetFieldValues", (_NVML_FI_DEV_MEMORY_TEMP,))),
    ),
    _gauge(
        "temperature_threshold_celsius",
        "Temperatures at which the card acts by itself.",
        *(
            _labelled(_read(Call("nvmlDeviceGetTemperatureThreshold", (code,))), threshold=name)
            for name, code in _THRESHOLDS.items()
        ),
    ),
    _gauge(
        "fan_speed_ratio",
        "Intended speed of the fan, 1 = its maximum.",
        _read(Call("nvmlDeviceGetFanSpeed"), scale=_PERCENT),
    ),
    _gauge("power_draw", "Power that the card draws, in watts.", _read(Call("nvmlDeviceGetPowerUsage"), scale=_MILLI)),
    _gauge(
        "power_limit_watts",
        "Limits of the power draw: enforced is what holds now, min and max what may be set.",
        _labelled(_read(Call("nvmlDeviceGetEnforcedPowerLimit"), scale=_MILLI), limit="enforced"),
        _labelled(_read(Call("nvmlDeviceGetPowerManagementLimit"), scale=_MILLI), limit="management"),
        _labelled(_read(Call("nvmlDeviceGetPowerManagementDefaultLimit"), scale=_MILLI), limit="default"),
        _labelled(_read(_LIMIT_CONSTRAINTS, 0, _MILLI), limit="min"),
        _labelled(_read(_LIMIT_CONSTRAINTS, 1, _MILLI), limit="max"),
    ),
    _counter(
        "energy_joules_total",
        "Energy used since the driver was loaded (Volta and newer).",
        _read(Call("nvmlDeviceGetTotalEnergyConsumption"), scale=_MILLI),
    ),
    _gauge("clock_hertz", "Clock frequency now.", *_by_clock("nvmlDeviceGetClockInfo")),
    _gauge("max_clock_hertz", "Highest clock frequency.", *_by_clock("nvmlDeviceGetMaxClockInfo")),
    _gauge(
        "application_clock_hertz",
        "Clock frequency that applications are given unless something throttles.",
        *(s for s in _by_clock("nvmlDeviceGetApplicationsClock") if s.labels[0][1] in ("graphics", "memory")),
    ),
    _gauge(
        "performance_state",
        "Performance state, 0 (fastest) to 15.",
        Sample((), (_PERFORMANCE_STATE,), _performance_state),
    ),
    _gauge(
        "throttle_reason",
        "1 for each reason that lowers the clocks now.",
        *(_labelled(_bit(mask), reason=reason) for reason, mask in _THROTTLE_REASONS.items()),
    ),
    _gauge(
        "pcie_link_generation", "PCIe generation of the link now.", _read(Call("nvmlDeviceGetCurrPcieLinkGeneration"))
    ),
    _gauge(
        "pcie_link_max_generation",
        "Highest PCIe generation of card and slot together.",
        _read(Call("nvmlDeviceGetMaxPcieLinkGeneration")),
    ),
    _gauge("pcie_link_width", "PCIe lanes in use now.", _read(Call("nvmlDeviceGetCurrPcieLinkWidth"))),
    _gauge(
        "pcie_link_max_width",
        "Most PCIe lanes of card and slot together.",
        _read(Call("nvmlDeviceGetMaxPcieLinkWidth")),
    ),
    _counter(
        "pcie_replays_total",
        "Transfers that were repeated after an error on the link.",
        _read(Call("nvmlDeviceGetPcieReplayCounter")),
    ),
    _gauge(
        "pcie_throughput_bytes_per_second",
        "Traffic over the last 20 ms, as the GPU sees it.",
        _labelled(_read(Call("nvmlDeviceGetPcieThroughput", (0,)), scale=_KILOBYTE), direction="transmit"),
        _labelled(_read(Call("nvmlDeviceGetPcieThroughput", (1,)), scale=_KILOBYTE), direction="receive"),
    ),
    _gauge("ecc_enabled", "Whether memory is error-correcting now.", _read(_ECC_MODE, 0)),
    _gauge("ecc_enabled_pending", "Whether it will be after the next reboot.", _read(_ECC_MODE, 1)),
    _counter(
        "ecc_errors_total",
        "Memory errors: volatile since the driver was loaded, aggregate over the card's life.",
        *_ecc_samples(),
    ),
    _gauge(
        "retired_pages",
        "Memory pages that are no longer used because of errors (before Ampere).",
        _labelled(_length(Call("nvmlDeviceGetRetiredPages", (0,))), cause="multiple_single_bit"),
        _labelled(_length(Call("nvmlDeviceGetRetiredPages", (1,))), cause="double_bit"),
    ),
    _gauge(
        "retired_pages_pending",
        "1 if a page will be retired at the next reset.",
        _read(Call("nvmlDeviceGetRetiredPagesPendingStatus")),
    ),
    _gauge(
        "remapped_rows",
        "Memory rows that were replaced because of errors (Ampere and newer).",
        _labelled(_read(_REMAPPED_ROWS, 0), error="corrected"),
        _labelled(_read(_REMAPPED_ROWS, 1), error="uncorrected"),
    ),
    _gauge("remapped_rows_pending", "1 if a row will be replaced at the next reset.", _read(_REMAPPED_ROWS, 2)),
    _gauge("remapped_rows_failed", "1 if a row could not be replaced.", _read(_REMAPPED_ROWS, 3)),
    _gauge(
        "persistence_mode",
        "Whether the driver stays loaded without clients.",
        _read(Call("nvmlDeviceGetPersistenceMode")),
    ),
    _gauge("mig_enabled", "Whether the card is split into MIG devices.", _read(MIG_MODE, 0)),
)
"""Every metric whose samples are NVML answers. Health, info, processes and Xid events are in render.py."""


def _device_calls() -> tuple[Call, ...]:
    calls = [*INFO_CALLS, *(call for family in FAMILIES for sample in family.samples for call in sample.calls)]
    return tuple(dict.fromkeys([*calls, BUS_WIDTH, CORES, COMPUTE_PROCESSES, GRAPHICS_PROCESSES]))


DEVICE_CALLS = _device_calls()
"""Every call that a reading makes about each GPU, without duplicates."""
