"""Which NVIDIA devices this process may use, and whether the plugin serves them.

The CUDA driver is asked by ctypes: it applies CUDA_VISIBLE_DEVICES and the device order itself, makes no context,
takes no VRAM, and needs no torch. A server leaves the asking to a short process of its own (`devices`), since a process
that has initialised the driver cannot fork workers that use it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Literal

from sglang_pascal.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

PLUGIN_NAME: Final = "pascal"
"""Value of SGLANG_PLATFORM that names this plugin: its entry point."""
PRETENDED_CARD: Final = "SGLANG_PASCAL_PRETENDED_CARD"
"""Variable of the tests' switch, which lets a process see another card (`tests/support/pretended`)."""
PASCAL_MAJOR: Final = 6
"""Compute capabilities 6.0, 6.1 and 6.2."""
DRIVER_LIBRARY: Final = "libcuda.so.1"
_NOT_INITIALIZED: Final = 3
"""CUDA_ERROR_NOT_INITIALIZED of cuda.h: nothing has called cuInit in this process."""
_NO_DEVICE: Final = 100
_STUB_LIBRARY: Final = 34
"""CUDA_ERROR_NO_DEVICE and CUDA_ERROR_STUB_LIBRARY of cuda.h."""
_MAJOR_ATTRIBUTE: Final = 75
_MINOR_ATTRIBUTE: Final = 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""
_NAME_BYTES: Final = 256
_PROBE_SECONDS: Final = 120
"""Longest that the driver may take to initialise: it does this for every GPU of the host, without persistence mode
anew each time."""


@dataclass(frozen=True)
class Device:
    """One visible NVIDIA device."""

    index: int
    """Index in this process."""
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int = 0
    """Total memory of the device; 0 if it was not queried."""

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
    if old := [device for device in devices if device.compute_capability[0] < PASCAL_MAJOR]:
        return Decision(
            None,
            f"{seen}: nothing here serves a card older than Pascal, as {', '.join(device.name for device in old)} is; "
            "show Pascal cards only with CUDA_VISIBLE_DEVICES",
        )
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


def refuse_pretended_card(environment: Mapping[str, str]) -> None:
    """Raise PluginError if the tests' switch is set and is not in this process: no server may see another card."""
    if PRETENDED_CARD in environment and "pretended_card" not in sys.modules:
        raise PluginError(
            f"{PRETENDED_CARD}={environment[PRETENDED_CARD]} is for this project's tests, "
            "under `python tests/support/pretended`: unset it"
        )


@functools.cache
def devices() -> tuple[Device, ...]:
    """Return `visible_devices` as another process sees them, so that the driver stays uninitialised in this one."""
    if _driver() is None:
        return ()
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise PluginError(f"the CUDA driver did not answer within {_PROBE_SECONDS} s; {_REMEDY}") from exc
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PluginError(
            lines[-1] if _REMEDY in lines[-1] else f"the CUDA driver cannot be asked: {lines[-1]}; {_REMEDY}"
        )
    return tuple(
        Device(**fields | {"compute_capability": tuple(fields["compute_capability"])})
        for fields in json.loads(done.stdout)
    )


def is_cuda_initialized() -> bool:
    """Whether anything in this process has initialised the CUDA driver. This check does not initialise it."""
    driver = _driver()
    return driver is not None and driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


def visible_devices() -> list[Device]:
    """Return the devices that the CUDA driver shows this process; none without a driver or visible device.

    This initialises the driver.
    """
    driver = _driver()
    if driver is None:
        return []
    code = driver.cuInit(0)
    if code in (_NO_DEVICE, _STUB_LIBRARY):
        return []
    _check(code, "initialise")
    count = ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "count the devices of")
    return [_device(driver, index) for index in range(count.value)]


def _driver() -> ctypes.CDLL | None:
    """Load the driver's library; None without one, or if this process may use no device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        return ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return None


def _device(driver: ctypes.CDLL, index: int) -> Device:
    handle, major, minor, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _check(driver.cuDeviceGet(ctypes.byref(handle), index), f"open device {index} of")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR_ATTRIBUTE, handle), f"ask device {index} of")
    _check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR_ATTRIBUTE, handle), f"ask device {index} of")
    _check(driver.cuDeviceGetName(name, _NAME_BYTES, handle), f"name device {index} of")
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle), f"ask device {index} of")
    return Device(index, name.value.decode(errors="replace"), (major.value, minor.value), total.value)


_REMEDY: Final = "check nvidia-smi, or set CUDA_VISIBLE_DEVICES= to serve on the CPU"


def _check(code: int, action: str) -> None:
    """Raise if the driver is there but fails: to continue without the GPU would hide the fault."""
    if code:
        raise PluginError(f"failed to {action} the CUDA driver: error {code}; {_REMEDY}")


def _print_devices() -> int:
    """Print the devices as JSON, or one line on standard error."""
    try:
        sys.stdout.write(json.dumps([asdict(device) for device in visible_devices()]))
    except PluginError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_print_devices())
