"""The facts about a host: plain values, collected once and judged by every check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pascaline.engines import DEFAULT_ENGINE, engine_named
from pascaline.engines.installation import Installation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.cards import Card
    from pascaline.configuration import Configuration
    from pascaline.engines import Engine
    from pascaline.gpu.host_bandwidth import HostBandwidth
    from pascaline.gpu.reading import DeviceReading, Reading
    from pascaline.models.spec import ModelSpec
    from pascaline.planning.plan import Plan
    from pascaline.settings import Settings

NVIDIA_VENDOR = "0x10de"
PASCAL_MAJOR = 6
"""First digit of the compute capabilities 6.0, 6.1 and 6.2."""


@dataclass(frozen=True, slots=True)
class PciGpu:
    """An NVIDIA display or 3D controller on the PCI bus, whether or not a driver serves it."""

    address: str
    """PCI address, such as 0000:3b:00.0."""
    device: str
    """PCI device number, such as 0x1bb3."""
    driver: str
    """Kernel driver that is bound to it; empty if none is."""
    numa_node: int | None = None
    """None if the kernel names none."""


@dataclass(frozen=True, slots=True)
class Node:
    """A device node."""

    mode: int
    """Permission bits."""
    accessible: bool
    """Whether this user may read and write it."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What the kernel reports about NVIDIA's driver."""

    version: str = ""
    """Version of the loaded module; empty if none is loaded."""
    is_open: bool = False
    """Whether the module is the open one."""
    modules: frozenset[str] = frozenset()
    """Loaded modules among nvidia's and nouveau."""
    pci: tuple[PciGpu, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    """The existing /dev/nvidia* nodes, by path."""
    models: tuple[str, ...] = ()
    """Names of the GPUs that the driver's folder in /proc lists, in the order of the bus."""

    @property
    def branch(self) -> int:
        """First number of the version; 0 without a driver."""
        return int(self.version.partition(".")[0] or 0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML reports it."""

    reading: DeviceReading
    card: Card | None
    """Its profile, if there is one."""
    processes: tuple[GpuProcess, ...] = ()

    @property
    def name(self) -> str:
        """The driver's name for it."""
        return str(self.reading.values.get("nvmlDeviceGetName", "")) or f"GPU {self.reading.index}"

    @property
    def label(self) -> str:
        """Its name in evidence."""
        return f"GPU {self.reading.index} ({self.name})"

    def numbers(self, call: str) -> list[int]:
        """Return the numbers that an NVML call returned; empty if it failed."""
        value = self.reading.values.get(call)
        if isinstance(value, int):
            return [value]
        return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []

    def number(self, call: str) -> int | None:
        """Return the single or first number that an NVML call returned; None if it failed."""
        return next(iter(self.numbers(call)), None)

    @property
    def compute_capability(self) -> str:
        """Such as 6.1; empty if unknown."""
        return ".".join(map(str, self.numbers("nvmlDeviceGetCudaComputeCapability")))

    @property
    def is_pascal(self) -> bool:
        """Whether this project's own engine serves it."""
        return self.compute_capability.startswith(f"{PASCAL_MAJOR}.")

    @property
    def memory(self) -> tuple[int, int, int] | None:
        """Total, free and used bytes; None if the driver does not report them."""
        if v2 := self.numbers("nvmlDeviceGetMemoryInfo_v2"):
            total, _, free, used = v2
            return total, free, used
        if v1 := self.numbers("nvmlDeviceGetMemoryInfo"):
            total, free, used = v1
            return total, free, used
        return None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds GPU memory."""

    pid: int
    bytes: int | None
    name: str
    unit: str
    """Its systemd unit; empty if it has none, or if this user may not see it."""
    cpus: frozenset[int] = frozenset()
    """CPUs that it may run on; empty if unknown."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that the settings name."""

    path: str = ""
    error: str = ""
    """Why the model cannot be read; there is then no spec."""
    spec: ModelSpec | None = None
    sha256: tuple[str, ...] = ()
    """Checksum of each file; empty if not computed."""
    checksum_error: str = ""
    has_tokenizer: bool = False
    has_chat_template: bool = False
    read_bytes_per_second: float | None = None
    """Speed of the disk that holds it; None if not measured."""


@dataclass(frozen=True, slots=True)
class Instance:
    """The instance in question: its settings, its unit, and what its agent and engine report."""

    name: str = ""
    others: tuple[str, ...] = ()
    """The instances on this host, if there are several and none was named."""
    configuration: Configuration | None = None
    configuration_error: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The engine's variables."""
    environment_source: str = ""
    """The process or file from which the variables were read."""
    unit: Mapping[str, str] = field(default_factory=dict)
    """Properties of its systemd unit; empty without one."""
    health: Mapping[str, Any] | None = None
    """The agent's answer to /health; None without an answer."""
    plan: Mapping[str, Any] | None = None
    """The agent's answer to /plan."""
    engine_metrics: str = ""

    @property
    def settings(self) -> Settings | None:
        """Its settings; None if they could not be read."""
        return self.configuration.settings if self.configuration else None

    @property
    def state(self) -> str:
        """The agent's name for the state; empty without an agent's answer."""
        return str(self.health.get("state", "")) if self.health else ""

    @property
    def is_running(self) -> bool:
        """Whether an engine has, or may have, the GPU's memory now."""
        return self.state not in ("", "planned", "failed")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system."""

    point: str
    kind: str
    """Such as ext4, tmpfs."""
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class System:
    """The machine around the GPU."""

    is_nixos: bool = False
    glibc: str = ""
    """Version; empty without glibc."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """/proc/meminfo, bytes."""
    cpu_flags: frozenset[str] = frozenset()
    """Instruction-set flags of the first CPU; empty if they cannot be read."""
    huge_pages: str = ""
    """always, madvise or never."""
    governor: str = ""
    """CPU frequency governor; empty if the kernel has none (a virtual machine)."""
    memory_limit: int | None = None
    """Bytes that the cgroup allows; None: no limit."""
    cpu_limit: float | None = None
    """CPUs that the cgroup allows; None: no limit."""
    limits_of: str = ""
    """Name of the unit or process whose cgroup sets these two limits."""
    open_files: int | None = None
    """Hard limit of open files; None if unknown."""
    listening: frozenset[int] = frozenset()
    """TCP ports that something listens on."""
    clock_synchronised: bool | None = None
    """None if no time service reports it."""
    unix_time: float = 0.0
    cache: Mount | None = None
    """File system of the prepared models."""
    cuda_cache: Mount | None = None
    """File system of the driver's cache of compiled kernels; None if the folder is unknown."""
    cuda_cache_folder: str = ""
    cuda_cache_writable: bool = False


@dataclass(frozen=True, slots=True)
class NumaNode:
    """Memory with the CPUs that are nearest to it."""

    number: int
    cpus: frozenset[int]
    distances: Mapping[int, int]
    """Node -> the firmware's figure for its distance; 10 is the node itself."""
    socket: frozenset[int] = frozenset()
    """The nodes of its socket, itself among them; empty if the kernel does not report sockets."""


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """A place for a memory module, as the firmware describes it."""

    locator: str
    """The firmware's name for the slot."""
    channel: str
    """Socket and channel; empty if the firmware's names do not contain them."""
    bytes: int
    """Size of the module; 0 if the slot is empty."""
    speed: str
    """Such as 2400 MT/s; empty if unknown."""


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host's memory, from which a CPU computes what the GPU's does not hold."""

    nodes: tuple[NumaNode, ...] = ()
    slots: tuple[MemorySlot, ...] = ()
    slots_error: str = "the firmware was not asked"
    """Why the slots are unknown."""
    swapped_bytes: int | None = None
    """Memory of the instance's unit that is in swap; None if unknown."""
    bandwidth: HostBandwidth | None = None
    """What `pascaline plan --measure-host` found; None if it was not measured on this CPU."""


@dataclass(frozen=True, slots=True)
class Logs:
    """Lines of the journal; None if it cannot be read."""

    kernel: tuple[str, ...] | None = None
    """Lines of this boot about the GPU driver and about lack of memory."""
    unit: tuple[str, ...] | None = None
    """The last thousand lines of the instance's unit."""


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that the checks judge."""

    driver: Driver = Driver()
    nvml: Reading | None = None
    """None without a driver to ask."""
    gpus: tuple[Gpu, ...] = ()
    libcuda: str = ""
    """Path of libcuda.so.1; empty if not found."""
    nvcc: str = ""
    """Release of the CUDA toolkit on PATH or under CUDA_PATH, such as 11.8; empty without one."""
    system: System = System()
    memory: HostMemory = HostMemory()
    engine: Installation = field(default_factory=Installation)
    model: ModelFacts = ModelFacts()
    instance: Instance = Instance()
    logs: Logs = Logs()
    plan: Plan | None = None
    """The plan of these settings on this host's card; None if none could be made."""
    plan_error: str = ""
    """Why there is no plan, if a fact that it needs is unknown."""
    plan_refusal: str = ""
    """Why the settings cannot serve the model; empty if no reason is known."""

    @property
    def settings(self) -> Settings | None:
        """The instance's settings; None if they could not be read."""
        return self.instance.settings

    @property
    def engine_kind(self) -> Engine:
        """The engine that the settings name."""
        return engine_named(self.settings.engine if self.settings else DEFAULT_ENGINE)

    @property
    def wants_gpu(self) -> bool:
        """Whether the model is meant to run on a GPU, by what is known."""
        device = self.settings.device if self.settings else "auto"
        return device == "cuda" or (device == "auto" and bool(self.driver.pci))

    @property
    def pascal(self) -> tuple[Gpu, ...]:
        """The GPUs of compute capability 6.x."""
        return tuple(gpu for gpu in self.gpus if gpu.is_pascal)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the GPUs, each once."""
        return tuple(sorted({gpu.compute_capability for gpu in self.gpus if gpu.compute_capability}))
