"""A reading as a scenario file, which the fake NVML replays (fake_nvml/README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pascaline.gpu.calls import error_name
from pascaline.gpu.metrics import COMPUTE_PROCESSES, GRAPHICS_PROCESSES
from pascaline.gpu.reading import DeviceStatus

if TYPE_CHECKING:
    from pascaline.gpu.calls import Raw
    from pascaline.gpu.reading import DeviceReading, Reading

_PROCESS_KEYS = {COMPUTE_PROCESSES.key, GRAPHICS_PROCESSES.key}


def to_scenario(reading: Reading, *, title: str = "Recorded by pascaline exporter --record") -> str:
    """Return every answer of a reading, error codes included, one call a line."""
    lines = [f"# {title}", "[library]", f"nvmlDeviceGetCount = {reading.counted}"]
    lines += [f"{key} = {_value(key, value)}" for key, value in reading.library.items()]
    for device in reading.devices:
        lines += ["", f"[gpu {device.index}]", f"nvmlDeviceGetUUID = {device.uuid}", *_device_lines(device)]
    return "\n".join(lines) + "\n"


def _device_lines(device: DeviceReading) -> list[str]:
    if device.status is not DeviceStatus.OK:
        code = next((code for code in device.errors.values()), None)
        return [f"nvmlDeviceGetHandleByIndex = error {error_name(code) if code else 'GPU_IS_LOST'}"]
    answers = [f"{key} = {_value(key, value)}".rstrip() for key, value in device.values.items()]
    return answers + [f"{key} = error {error_name(code)}" for key, code in device.errors.items()]


def _value(key: str, value: Raw) -> str:
    if not isinstance(value, list):
        return str(value)
    items: list[Any] = value
    if key in _PROCESS_KEYS:
        return " ".join(f"{pid}:{'-' if used is None else used}" for pid, used in items)
    return " ".join(map(str, items))
