"""Which NVIDIA devices this process may use, and whether the plugin serves them.

The CUDA driver is asked by ctypes: it applies CUDA_VISIBLE_DEVICES and the device order itself, makes no context,
takes no VRAM, and needs no torch.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sglang_pascal.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGIN_NAME: Final = "pascal"
"""Value of SGLANG_PLATFORM that names this plugin: its entry point."""
PASCAL_MAJOR: Final = 6
"""Compute capabilities 6.0, 6.1 and 6.2."""
DRIVER_LIBRARY: Final = "libcuda.so.1"
_NO_DEVICE: Final = 100
_STUB_LIBRARY: Final = 34
"""CUDA_ERROR_NO_DEVICE and CUDA_ERROR_STUB_LIBRARY of cuda.h."""
_MAJOR_ATTRIBUTE: Final = 75
_MINOR_ATTRIBUTE: Final = 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
_NAME_BYTES: Final = 256


@dataclass(frozen=True)
class Device:
    """One visible NVIDIA device."""

    index: int
    """Index in this process."""
    name: str
    compute_capability: tuple[int, int]

    @property
    def is_pascal(self) -> bool:
        """Whether this plugin is made for it."""
        return self.compute_capability[0] == PASCAL_MAJOR

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor})"


@dataclass(frozen=True)
class Decision:
    """Whether the plugin serves, on what, and why."""

    device: Literal["cpu", "cuda"] | None
    """None = the plugin does nothing."""
    reason: str


def decide(devices: list[Device], environment: Mapping[str, str], torch_hip: str | None = None) -> Decision:
    """Decide what to do with these devices.

    environment: SGLANG_PLATFORM=pascal asks for the plugin on any device; SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own
    CPU engine. torch_hip: `torch.version.hip`, set if torch was built for AMD.
    """
    is_named = environment.get("SGLANG_PLATFORM") == PLUGIN_NAME
    seen = ", ".join(str(device) for device in devices)
    if devices and all(device.is_pascal for device in devices):
        return Decision("cuda", f"{seen}")
    if devices and is_named:
        return Decision("cuda", f"SGLANG_PLATFORM names it; the device is {seen}")
    if devices:
        return Decision(
            None,
            f"{seen}: SGLang's own kernels serve cards newer than Pascal; "
            "name it with SGLANG_PLATFORM=pascal, or show Pascal cards only with CUDA_VISIBLE_DEVICES",
        )
    if is_named:
        return Decision("cpu", "SGLANG_PLATFORM names it; no NVIDIA device is visible")
    if environment.get("SGLANG_USE_CPU_ENGINE") == "1":
        return Decision(None, "SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU engine")
    if torch_hip is not None:
        return Decision(None, "torch is built for AMD devices")
    return Decision("cpu", "no NVIDIA device is visible")


def visible_devices() -> list[Device]:
    """Return the devices that the CUDA driver shows this process; none without a driver or visible device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return []
    code = driver.cuInit(0)
    if code in (_NO_DEVICE, _STUB_LIBRARY):
        return []
    _check(code, "initialise")
    count = ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "count the devices of")
    return [_device(driver, index) for index in range(count.value)]


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _check(driver.cuDeviceGet(ctypes.byref(handle), index), f"open device {index} of")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR_ATTRIBUTE, handle), f"ask device {index} of")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR_ATTRIBUTE, handle), f"ask device {index} of")
    _check(driver.cuDeviceGetName(name, _NAME_BYTES, handle), f"name device {index} of")
    return Device(index, name.value.decode(errors="replace"), (major.value, minor.value))


def _check(code: int, action: str) -> None:
    """Raise if the driver is there but fails: to continue without the GPU would hide the fault."""
    if code:
        raise PluginError(
            f"failed to {action} the CUDA driver: error {code}; "
            "check nvidia-smi, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"
        )
