"""Causes of an engine's failure, and the CUDA error messages that every engine passes on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Cause(StrEnum):
    """Why an engine failed, according to its own output."""

    GPU_LOST = "gpu-lost"
    """The engine printed NVML's or the driver's message about a lost GPU."""
    CUDA_FAULT = "cuda-fault"
    """A CUDA error that has several causes, among them a lost GPU: it counts only together with other evidence."""
    DEVICE_MEMORY = "device-memory"
    HOST_MEMORY = "host-memory"
    PORT = "port"
    MODEL = "model"
    """The file is damaged, or holds a model that the engine does not support."""
    INSTALLATION = "installation"
    """Driver or engine is not installed correctly."""
    OTHER = "other"
    """The engine explained it in a message that is written for users."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A pattern of output and its meaning."""

    pattern: re.Pattern[str]
    cause: Cause
    text: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The cause of a failure according to an engine's last lines."""

    cause: Cause
    text: str


@dataclass(frozen=True, slots=True)
class CudaError:
    """An error of the CUDA runtime or driver that a lost GPU can cause."""

    code: int
    """cudaError_t; the driver's CUresult has the same number."""
    names: tuple[str, ...]
    """Names in cudaError_t and in CUresult."""
    message: str
    """The text that cudaGetErrorString returns."""


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
    """Return the last error of CUDA_FAULTS that a line about CUDA contains, by its message or its name; None if none.

    torch and ggml write "CUDA error: MESSAGE". While they start, torch writes "Error 101: MESSAGE" and ggml "failed to
    initialize CUDA: MESSAGE". The plugin's kernels write the driver's names.
    """
    found = None
    for line in lines:
        if _CUDA_WORDS.search(line):
            found = next((error for error in CUDA_FAULTS if _names(line, error)), found)
    return found


def _names(line: str, error: CudaError) -> bool:
    message = rf"\b{re.escape(error.message)}(?!\w)"
    return bool(re.search(message, line)) or any(re.search(rf"\b{name}\b", line) for name in error.names)
