"""A reading as Prometheus text (exposition format 0.0.4) or JSON: pure functions.

Written here rather than with prometheus-client's registry because importing that takes a quarter of the memory that
the exporter may use; the tests parse every page with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.gpu.metrics import (
    COMPUTE_CAPABILITY,
    COMPUTE_PROCESSES,
    FAMILIES,
    GRAPHICS_PROCESSES,
    NAME,
    PCI_INFO,
    PREFIX,
    SERIAL,
    VBIOS,
    VIRTUALIZATION,
)
from pascaline.gpu.processes import ProcessIdentity, identify
from pascaline.gpu.reading import DeviceStatus, DriverStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pascaline.gpu.metrics import Family, MetricType
    from pascaline.gpu.reading import DeviceReading, Reading

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_VIRTUALIZATION_MODES = {
    0: "none",
    1: "passthrough",
    2: "vgpu",
    3: "host_vgpu",
    4: "host_vsga",
}  # nvmlGpuVirtualizationMode_t
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@dataclass(frozen=True)
class _Metric:
    """A metric whose samples are not single NVML answers; the others are in metrics.FAMILIES."""

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()


_GPU = ("gpu", "uuid")
_SUCCESS = _Metric("scrape_success", "gauge", "1 if NVML answered the last reading.")
_DURATION = _Metric("scrape_duration_seconds", "gauge", "Time that the last reading took.")
_LAST_SUCCESS = _Metric(
    "last_scrape_success_timestamp_seconds", "gauge", "When the last reading that succeeded began; absent before it."
)
_DRIVER_STATUS = _Metric("driver_status", "gauge", "1 for the state that NVML is in.", ("status",))
_READER_STARTS = _Metric("reader_starts_total", "counter", "Processes that were started to call NVML.")
_READERS_ABANDONED = _Metric("readers_abandoned", "gauge", "Processes that hang in the driver and cannot be killed.")
_COUNT = _Metric("count", "gauge", "GPUs that NVML counts.")
_DRIVER_INFO = _Metric(
    "driver_info", "gauge", "Versions of the driver.", ("driver_version", "nvml_version", "cuda_version")
)
_LOST = _Metric(
    "lost", "gauge", "1 if NVML says that the GPU is lost, a call about it hangs, or it is no longer counted.", _GPU
)
_DEVICE_STATUS = _Metric("device_status", "gauge", "1 for the state that the GPU is in.", (*_GPU, "status"))
_XID_ERRORS = _Metric("xid_errors_total", "counter", "Xid errors since the exporter started.", (*_GPU, "xid"))
_XID_LAST = _Metric("xid_last_timestamp_seconds", "gauge", "When the last of these Xid errors came.", (*_GPU, "xid"))
_INFO = _Metric(
    "info",
    "gauge",
    "What the card is.",
    (*_GPU, "name", "pci_bus_id", "serial", "vbios_version", "compute_capability", "virtualization"),
)
_PROCESS_MEMORY = _Metric(
    "process_memory_used_bytes",
    "gauge",
    "GPU memory of one process; unit is its systemd service or scope.",
    (*_GPU, "pid", "process", "unit"),
)
_FIXED = (
    _SUCCESS,
    _DURATION,
    _LAST_SUCCESS,
    _DRIVER_STATUS,
    _READER_STARTS,
    _READERS_ABANDONED,
    _COUNT,
    _DRIVER_INFO,
    _LOST,
    _DEVICE_STATUS,
    _XID_ERRORS,
    _XID_LAST,
    _INFO,
    _PROCESS_MEMORY,
)


def render(reading: Reading, identity: Callable[[int], ProcessIdentity] = identify) -> str:
    """Return the page for one reading; `identity` returns the name and unit of a process."""
    devices = [device for device in reading.devices if device.status is DeviceStatus.OK]
    lines: list[str] = []
    for metric, rows in _fixed_metrics(reading, devices, identity):
        _append(lines, PREFIX + metric.name, metric, [(_labels(metric.labels, values), v) for values, v in rows])
    bases = [(device, _labels(_GPU, _who(device))) for device in devices]
    for family in FAMILIES:
        _append(lines, family.name, family, _family_rows(family, bases))
    return "".join(lines)


def to_json(reading: Reading, identity: Callable[[int], ProcessIdentity] = identify) -> dict[str, Any]:
    """Return a reading as `--json` prints it: health, and for each GPU its series, named without the prefix."""
    return {
        "status": reading.status.value,
        "message": reading.message,
        "timestamp": reading.timestamp,
        "duration_seconds": reading.duration,
        "driver": dict(zip(_DRIVER_INFO.labels, _versions(reading), strict=True)),
        "gpus": [_device_json(device, identity) for device in reading.devices],
        "xids": [
            {"gpu": x.index, "uuid": x.uuid, "xid": x.xid, "count": x.count, "last_timestamp": x.last_timestamp}
            for x in reading.xids
        ],
    }


def metric_catalogue() -> dict[str, dict[str, Any]]:
    """Return type, help and labels of every metric that can be emitted: the contract."""
    found = {
        PREFIX + metric.name: {"type": metric.type, "help": metric.help, "labels": list(metric.labels)}
        for metric in _FIXED
    }
    for family in FAMILIES:
        labels = dict.fromkeys(key for sample in family.samples for key, _ in sample.labels)
        found[family.name] = {"type": family.type, "help": family.help, "labels": [*_GPU, *labels]}
    return found


def _fixed_metrics(
    reading: Reading, devices: list[DeviceReading], identity: Callable[[int], ProcessIdentity]
) -> Iterator[tuple[_Metric, Iterable[tuple[tuple[str, ...], float]]]]:
    yield _SUCCESS, [((), int(reading.succeeded))]
    if reading.status is not DriverStatus.STARTING:
        yield _DURATION, [((), round(reading.duration, 6))]
    if reading.last_success_timestamp is not None:
        yield _LAST_SUCCESS, [((), round(reading.last_success_timestamp, 3))]
    yield _DRIVER_STATUS, [((status.value,), int(status is reading.status)) for status in DriverStatus]
    yield _READER_STARTS, [((), reading.reader_starts)]
    yield _READERS_ABANDONED, [((), reading.readers_abandoned)]
    if reading.succeeded:
        yield _COUNT, [((), reading.counted)]
        yield _DRIVER_INFO, [(_versions(reading), 1)]
    yield _LOST, [(_who(device), int(device.status.is_lost)) for device in reading.devices]
    yield (
        _DEVICE_STATUS,
        [
            ((*_who(device), status.value), int(status is device.status))
            for device in reading.devices
            for status in DeviceStatus
        ],
    )
    xids = [((str(x.index), x.uuid, str(x.xid)), x) for x in reading.xids]
    yield _XID_ERRORS, [(labels, x.count) for labels, x in xids]
    yield _XID_LAST, [(labels, round(x.last_timestamp, 3)) for labels, x in xids]
    yield _INFO, [((*_who(device), *_info(device)), 1) for device in devices]
    yield _PROCESS_MEMORY, [((*_who(d), *who), used) for d in devices for who, used in _processes(d, identity)]


def _who(device: DeviceReading) -> tuple[str, str]:
    return str(device.index), device.uuid


def _versions(reading: Reading) -> tuple[str, str, str]:
    driver, nvml, cuda = (
        reading.library.get(f"nvmlSystemGet{what}") for what in ("DriverVersion", "NVMLVersion", "CudaDriverVersion")
    )
    # CUDA's number is 1000 * major + 10 * minor.
    cuda_text = f"{cuda // 1000}.{cuda % 1000 // 10}" if isinstance(cuda, int) else ""
    return _text(driver), _text(nvml), cuda_text


def _info(device: DeviceReading) -> tuple[str, ...]:
    capability, bus, mode = (device.values.get(call.key) for call in (COMPUTE_CAPABILITY, PCI_INFO, VIRTUALIZATION))
    return (
        _text(device.values.get(NAME.key)),
        _text(bus[0]) if isinstance(bus, list) else "",
        _text(device.values.get(SERIAL.key)),
        _text(device.values.get(VBIOS.key)),
        ".".join(map(str, capability)) if isinstance(capability, list) else "",
        _VIRTUALIZATION_MODES.get(mode, str(mode)) if isinstance(mode, int) else "",
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _processes(
    device: DeviceReading, identity: Callable[[int], ProcessIdentity]
) -> Iterator[tuple[tuple[str, str, str], int]]:
    """Yield each process once: one that computes and draws is in both of NVML's lists, with all its memory."""
    used: dict[int, int] = {}
    for call in (COMPUTE_PROCESSES, GRAPHICS_PROCESSES):
        listed: Any = device.values.get(call.key, [])
        used.update({pid: bytes_used for pid, bytes_used in listed if bytes_used is not None})
    for pid, bytes_used in sorted(used.items()):
        who = identity(pid)
        yield (str(pid), who.name, who.unit), bytes_used


def _family_rows(family: Family, bases: list[tuple[DeviceReading, str]]) -> Iterator[tuple[str, float]]:
    for device, base in bases:
        for sample in family.samples:
            value = sample.value(device.values)
            if value is not None:
                yield base + "".join(f',{key}="{text}"' for key, text in sample.labels), value


def _append(lines: list[str], name: str, metric: _Metric | Family, rows: Iterable[tuple[str, float]]) -> None:
    """Add a metric with its samples; one without samples is left out."""
    samples = [f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n" for labels, value in rows]
    if samples:
        lines.append(f"# HELP {name} {metric.help}\n# TYPE {name} {metric.type}\n")
        lines.extend(samples)


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True))


def _device_json(device: DeviceReading, identity: Callable[[int], ProcessIdentity]) -> dict[str, Any]:
    series = {
        family.name.removeprefix(PREFIX): _series_json(family, device)
        for family in FAMILIES
        if any(sample.value(device.values) is not None for sample in family.samples)
    }
    processes = [
        {"pid": int(pid), "process": name, "unit": unit, "memory_used_bytes": used}
        for (pid, name, unit), used in _processes(device, identity)
    ]
    return {
        "gpu": device.index,
        "uuid": device.uuid,
        "status": device.status.value,
        "message": device.message,
        "info": dict(zip(_INFO.labels[len(_GPU) :], _info(device), strict=True)),
        "series": series,
        "processes": processes,
    }


def _series_json(family: Family, device: DeviceReading) -> Any:
    """A number, or for a metric with labels a list of objects with the labels and `value`."""
    found = [(dict(sample.labels), sample.value(device.values)) for sample in family.samples]
    if not found[0][0]:
        return found[0][1]
    return [labels | {"value": value} for labels, value in found if value is not None]
