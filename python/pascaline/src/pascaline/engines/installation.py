"""What is installed of an engine on a host, as its own programs report it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Probe:
    """A command that asks an engine what is installed."""

    name: str
    """Under which a recorded host keeps its output."""
    command: tuple[str, ...]
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Installation:
    """What is installed; what the engine does not consist of is empty."""

    error: str = ""
    """Why there was no answer, or what failed first."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Version of each installed package of the engine, or of the engine's program by the engine's name."""
    torch_cuda: str = ""
    """CUDA version that torch was built for; empty if built without CUDA."""
    torch_architectures: tuple[str, ...] = ()
    """Such as sm_60, compute_90."""
    library_code: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Library (torch, cuBLAS, cuBLASLt, bitsandbytes) -> architectures of the GPU code that its file holds."""
    runs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Compute capability -> the plugin's attention, products and widths on such a card, in words."""
    supported: tuple[str, ...] = ()
    """Versions of the engine that the plugin was made for."""
    kernel_architectures: tuple[str, ...] = ()
    """Architectures of the plugin's prebuilt kernels, such as sm_61 and compute_61."""
    kernel_formats: tuple[str, ...] = ()
    """Tensor types that the plugin has kernels for."""
    entry_points: tuple[str, ...] = ()
    """Platforms registered with the engine."""
    unknown_variables: tuple[str, ...] = ()
    """Variables of the engine that are set but that its source does not mention."""
