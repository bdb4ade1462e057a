"""Loads and launches kernels through the CUDA driver API by ctypes. Needs no CUDA library except the driver.

A module is loaded once per device, into torch's context: on Pascal the sm_6x cubin, on anything newer the PTX, which
the driver compiles. A launch hands over its block of arguments (about 5 us of Python) and goes to torch's current
stream, so it is ordered with torch's own work and can be captured in a CUDA graph. Load modules before capturing: with
`preload`, or by one call of each operation.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from sglang_pascal.errors import PluginError
from sglang_pascal.kernels.build import ARCHITECTURES, MODULES, artifact

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_pascal.kernels.arguments import Block

ARCHITECTURE_VARIABLE: Final = "SGLANG_PASCAL_ARCHITECTURE"
"""60 or 61: which PTX a newer card compiles; 61 if unset. For testing the P100's path on other cards."""
DRIVER_LIBRARY: Final = "libcuda.so.1"
P4_MULTIPROCESSORS: Final = 20
_LOG_BYTES: Final = 8192
_JIT_ERROR_LOG: Final = 5
_JIT_ERROR_LOG_BYTES: Final = 6
"""CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES of cuda.h."""
_ARGUMENTS_POINTER: Final = 1
_ARGUMENTS_SIZE: Final = 2
"""CU_LAUNCH_PARAM_BUFFER_POINTER and CU_LAUNCH_PARAM_BUFFER_SIZE of cuda.h; 0 ends the list."""


class KernelError(PluginError):
    """A kernel cannot be loaded or launched."""

    exit_code = 5


@dataclass(frozen=True)
class Kernel:
    """A loaded function, and its threads per CTA."""

    name: str
    handle: ctypes.c_void_p
    threads: int
    device: int

    def launch(self, grid: tuple[int, int, int], arguments: Block, shapes: str = "") -> None:
        """Start it on torch's current stream of its device.

        arguments: the block of this kernel (`block_of`). shapes: for the text of an error.
        """
        size = ctypes.c_size_t(arguments.n_bytes)
        extra = (ctypes.c_void_p * 5)(
            _ARGUMENTS_POINTER,
            ctypes.addressof(arguments),
            _ARGUMENTS_SIZE,
            ctypes.addressof(size),
            0,
        )
        # The number alone: torch.cuda.current_stream makes an object, which takes longer.
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.device))
        code = _cuda().cuLaunchKernel(self.handle, *grid, self.threads, 1, 1, 0, stream, None, extra)
        if code:
            raise KernelError(
                f"kernel {self.name} failed to start: {describe(code)}; grid {grid}, {self.threads} threads, {shapes}; "
                "an earlier kernel may be the cause: run again with CUDA_LAUNCH_BLOCKING=1"
            )


@functools.cache
def kernel(module: str, function: str, threads: int, device: int) -> Kernel:
    """Return a kernel; load it on first use."""
    handle = ctypes.c_void_p()
    loaded = _module(module, device)
    code = _cuda().cuModuleGetFunction(ctypes.byref(handle), loaded, function.encode())
    if code:
        raise KernelError(f"module {module} has no kernel {function}: {describe(code)}; reinstall sglang-pascal")
    return Kernel(function, handle, threads, device)


def preload(modules: Iterable[str], device: int) -> None:
    """Load modules now: no module can be loaded while a CUDA graph is captured."""
    for name in modules:
        _module(name, device)


@functools.cache
def _module(name: str, device: int) -> ctypes.c_void_p:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    capability = torch.cuda.get_device_capability(device)
    architecture, kind = target_of(capability)
    image = artifact(MODULES[name], architecture, kind)
    handle, log = ctypes.c_void_p(), ctypes.create_string_buffer(_LOG_BYTES)
    options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # makes torch's context current in this thread
        code = _cuda().cuModuleLoadDataEx(ctypes.byref(handle), image + b"\0", 2, options, values)
    if code:
        raise KernelError(
            f"the driver refuses the {kind} of {name} for compute capability {capability[0]}.{capability[1]}: "
            f"{describe(code)}; {' '.join(log.value.decode(errors='replace').split()) or 'no log'}; "
            "install a driver of the 470 to 580 series"
        )
    return handle


@functools.cache
def multiprocessors(device: int | None) -> int:
    """Return a card's number of multiprocessors; 20, as on a P4, if device is None."""
    if device is None:
        return P4_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_dp4a(device: int | None) -> bool:
    """Whether a card runs the code for sm_61, which has dp4a, and not that for sm_60; True if device is None."""
    return device is None or target_of(torch.cuda.get_device_capability(device))[0] != "60"


def target_of(capability: tuple[int, int]) -> tuple[str, str]:
    """Return (architecture, kind of file) for a card."""
    if capability[0] == 6:
        return ("60" if capability[1] == 0 else "61"), "cubin"
    if capability[0] < 6:
        raise KernelError(
            f"compute capability {capability[0]}.{capability[1]} is older than Pascal: "
            "the kernels need 6.0 or newer; choose another card with CUDA_VISIBLE_DEVICES"
        )
    architecture = os.environ.get(ARCHITECTURE_VARIABLE, "61")
    if architecture not in ARCHITECTURES:
        raise KernelError(
            f"{ARCHITECTURE_VARIABLE} is {architecture!r}; allowed: {', '.join(ARCHITECTURES)}; unset it to use 61"
        )
    return architecture, "ptx"


def describe(code: int) -> str:
    """Return a driver error such as `CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS)`."""
    name = ctypes.c_char_p()
    _cuda().cuGetErrorName(code, ctypes.byref(name))
    return f"CUDA error {code} ({name.value.decode() if name.value else 'unknown'})"


@functools.cache
def _cuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as exc:
        raise KernelError(f"{DRIVER_LIBRARY} cannot be loaded: {exc}; install NVIDIA's driver") from exc
