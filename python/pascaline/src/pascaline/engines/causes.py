"""What an engine's last words mean, as an enumeration, and the words of CUDA that every engine passes on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Cause(StrEnum):
    """Why an engine failed, as far as its own words say."""

    GPU_LOST = "gpu-lost"
    """NVML's or the driver's words for a lost GPU, which reached the engine."""
    CUDA_FAULT = "cuda-fault"
    """CUDA's words that a lost GPU, among other causes, makes it say: they count with evidence only."""
    DEVICE_MEMORY = "device-memory"
    HOST_MEMORY = "host-memory"
    PORT = "port"
    MODEL = "model"
    """The file is damaged, or holds what the engine does not serve."""
    INSTALLATION = "installation"
    """Driver or engine is not installed as it must be."""
    OTHER = "other"
    """Told by the engine in words that are written for users."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A pattern of output and what it means."""

    pattern: re.Pattern[str]
    cause: Cause
    text: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an engine's last lines say."""

    cause: Cause
    text: str


@dataclass(frozen=True, slots=True)
class CudaError:
    """An error of the CUDA runtime or driver that a GPU which is gone can cause."""

    code: int
    """cudaError_t; the driver's CUresult has the same number."""
    names: tuple[str, ...]
    """In cudaError_t and in CUresult."""
    message: str
    """What cudaGetErrorString returns."""


CUDA_FAULTS = (
    CudaError(
        46,
        ("cudaErrorDevicesUnavailable", "CUDA_ERROR_DEVICE_UNAVAILABLE"),
        "CUDA-capable device(s) is/are busy or unavailable",
    ),
    CudaError(100, ("cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE"), "no CUDA-capable device is detected"),
    CudaError(101, ("cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE"), "invalid device ordinal"),
    CudaError(
        214, ("cudaErrorECCUncorrectable", "CUDA_ERROR_ECC_UNCORRECTABLE"), "uncorrectable ECC error encountered"
    ),
    CudaError(714, ("cudaErrorHardwareStackError", "CUDA_ERROR_HARDWARE_STACK_ERROR"), "hardware stack error"),
    CudaError(719, ("cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED"), "unspecified launch failure"),
    CudaError(999, ("cudaErrorUnknown", "CUDA_ERROR_UNKNOWN"), "unknown error"),
)
"""NVIDIA, CUDA Runtime API, cudaError_t. Each has other causes too: 719 is mostly a faulty kernel, 46 a card in
exclusive mode, 100 and 101 a wrong CUDA_VISIBLE_DEVICES. A test compares the messages with the installed runtime's."""

_CUDA_WORDS = re.compile(r"CUDA|cuda(?:Get|Set|Stream|Device|Error)\w*")


def cuda_fault(lines: Iterable[str]) -> CudaError | None:
    """Return the last of those errors that a line about CUDA names, by its message or its name.

    torch and ggml write "CUDA error: MESSAGE", torch at its start "Error 101: MESSAGE", ggml "failed to initialize
    CUDA: MESSAGE"; the plugin's kernels write the driver's names.
    """
    found = None
    for line in lines:
        if _CUDA_WORDS.search(line):
            found = next((error for error in CUDA_FAULTS if _names(line, error)), found)
    return found


def _names(line: str, error: CudaError) -> bool:
    message = rf"\b{re.escape(error.message)}(?!\w)"
    return bool(re.search(message, line)) or any(re.search(rf"\b{name}\b", line) for name in error.names)
