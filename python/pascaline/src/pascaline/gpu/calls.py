"""NVML calls, how their answers are flattened, and the error codes that mean more than a missing field."""

from __future__ import annotations

from dataclasses import dataclass

Raw = int | str | list[int] | list[list[int | None]]
"""An answer: a number, a text, a structure's members in order, or a list of processes as [pid, bytes or None]."""


@dataclass(frozen=True)
class Call:
    """One NVML call about a GPU or, without a handle, about the library."""

    function: str
    """Name in nvidia-ml-py, which is NVML's own (without a version suffix for the newest)."""
    args: tuple[int, ...] = ()
    fields: tuple[str, ...] = ()
    """Members of the structure that it returns, in the order in which an answer lists them; empty = not a structure."""
    version: int | None = None
    """Number by which nvidia-ml-py picks another version of the call; None = the one it takes by itself."""
    alias: str | None = None
    """Name of the C function if `version` selects another one than `function`."""

    @property
    def key(self) -> str:
        """Name and arguments, as messages and scenario files write them: "nvmlDeviceGetClockInfo 2"."""
        return " ".join([self.alias or self.function, *map(str, self.args)])


LIBRARY_CALLS = (
    Call("nvmlSystemGetDriverVersion"),
    Call("nvmlSystemGetNVMLVersion"),
    Call("nvmlSystemGetCudaDriverVersion"),
)
"""Asked once a reading, without a GPU."""

# Error codes (nvmlReturn_t).
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
LIB_RM_VERSION_MISMATCH = 18
UNINITIALIZED = 1

DEVICE_GONE = frozenset({GPU_IS_LOST, RESET_REQUIRED})
"""Codes after which no other answer about the GPU is trusted."""
LIBRARY_GONE = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, LIB_RM_VERSION_MISMATCH})
"""Codes after which this process's copy of NVML cannot be used any more."""

ERROR_NAMES = {
    1: "UNINITIALIZED",
    2: "INVALID_ARGUMENT",
    3: "NOT_SUPPORTED",
    4: "NO_PERMISSION",
    6: "NOT_FOUND",
    7: "INSUFFICIENT_SIZE",
    8: "INSUFFICIENT_POWER",
    9: "DRIVER_NOT_LOADED",
    10: "TIMEOUT",
    11: "IRQ_ISSUE",
    12: "LIBRARY_NOT_FOUND",
    13: "FUNCTION_NOT_FOUND",
    14: "CORRUPTED_INFOROM",
    15: "GPU_IS_LOST",
    16: "RESET_REQUIRED",
    17: "OPERATING_SYSTEM",
    18: "LIB_RM_VERSION_MISMATCH",
    19: "IN_USE",
    20: "MEMORY",
    21: "NO_DATA",
    22: "VGPU_ECC_NOT_SUPPORTED",
    23: "INSUFFICIENT_RESOURCES",
    25: "ARGUMENT_VERSION_MISMATCH",
    26: "DEPRECATED",
    27: "NOT_READY",
    28: "GPU_NOT_FOUND",
    29: "INVALID_STATE",
    999: "UNKNOWN",
}
"""nvmlReturn_t, without its prefix NVML_ERROR_."""


def error_name(code: int) -> str:
    """Return the name of an error code, or the number as text if NVML has learned a new one."""
    return ERROR_NAMES.get(code, str(code))
