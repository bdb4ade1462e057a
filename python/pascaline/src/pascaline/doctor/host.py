"""What is known of a host: plain values, collected once, that every check judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.cards import Card
    from pascaline.configuration import Configuration
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
    """As 0000:3b:00.0."""
    device: str
    """PCI device number, as 0x1bb3."""
    driver: str
    """Kernel driver that is bound to it; empty: none."""


@dataclass(frozen=True, slots=True)
class Node:
    """A device node."""

    mode: int
    """Permission bits."""
    accessible: bool
    """Whether this user may read and write it."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What the kernel tells of NVIDIA's driver."""

    version: str = ""
    """Of the loaded module; empty: none is loaded."""
    is_open: bool = False
    """Whether the module is the open one."""
    modules: frozenset[str] = frozenset()
    """Loaded modules among nvidia's and nouveau."""
    pci: tuple[PciGpu, ...] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    """/dev/nvidia* that exist, by path."""
    models: tuple[str, ...] = ()
    """Names of the GPUs that the driver's folder in /proc lists, in the order of the bus."""

    @property
    def branch(self) -> int:
        """First number of the version; 0 without a driver."""
        return int(self.version.partition(".")[0] or 0)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML answered about it."""

    reading: DeviceReading
    card: Card | None
    """Its profile, if there is one."""
    processes: tuple[GpuProcess, ...] = ()

    @property
    def name(self) -> str:
        """As the driver calls it."""
        return str(self.reading.values.get("nvmlDeviceGetName", "")) or f"GPU {self.reading.index}"

    @property
    def label(self) -> str:
        """How evidence names it."""
        return f"GPU {self.reading.index} ({self.name})"

    def numbers(self, call: str) -> list[int]:
        """Return the numbers that a call answered; empty where it did not."""
        value = self.reading.values.get(call)
        if isinstance(value, int):
            return [value]
        return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []

    def number(self, call: str) -> int | None:
        """Return the single or first number that a call answered; None where it did not."""
        return next(iter(self.numbers(call)), None)

    @property
    def compute_capability(self) -> str:
        """As 6.1; empty where it is unknown."""
        return ".".join(map(str, self.numbers("nvmlDeviceGetCudaComputeCapability")))

    @property
    def is_pascal(self) -> bool:
        """Whether this project's own engine serves it."""
        return self.compute_capability.startswith(f"{PASCAL_MAJOR}.")

    @property
    def memory(self) -> tuple[int, int, int] | None:
        """Total, free and used bytes; None where the driver does not tell."""
        if v2 := self.numbers("nvmlDeviceGetMemoryInfo_v2"):
            total, _, free, used = v2
            return total, free, used
        if v1 := self.numbers("nvmlDeviceGetMemoryInfo"):
            total, free, used = v1
            return total, free, used
        return None


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    bytes: int | None
    name: str
    unit: str
    """Its systemd unit; empty where it is in none, or hides from this user."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine's Python tells of itself; see engine_probe.py."""

    error: str = ""
    """Why it could not be asked."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Installed packages among torch, sglang, sglang-pascal, transformers, bitsandbytes."""
    torch_cuda: str = ""
    """CUDA version that torch was built for; empty: without CUDA."""
    torch_architectures: tuple[str, ...] = ()
    """As sm_60, compute_90."""
    supported_sglang: tuple[str, ...] = ()
    """Versions that the plugin was made for."""
    kernel_architectures: tuple[str, ...] = ()
    """Of the plugin's prebuilt kernels, as sm_61 and compute_61."""
    kernel_formats: tuple[str, ...] = ()
    """Tensor types that the plugin has kernels for."""
    entry_points: tuple[str, ...] = ()
    """Platforms that are registered with SGLang."""
    unknown_variables: tuple[str, ...] = ()
    """SGLANG_ variables that are set and that SGLang's source does not name."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that the settings name."""

    path: str = ""
    error: str = ""
    """Why it cannot be read; then there is no spec."""
    spec: ModelSpec | None = None
    sha256: tuple[str, ...] = ()
    """Of each file; empty where it was not computed."""
    checksum_error: str = ""
    has_tokenizer: bool = False
    has_chat_template: bool = False
    read_bytes_per_second: float | None = None
    """Speed of the disk that it is on; None where it was not measured."""


@dataclass(frozen=True, slots=True)
class Instance:
    """The instance that was asked about: its settings, its unit, and what its agent and engine say now."""

    name: str = ""
    others: tuple[str, ...] = ()
    """Instances on this host, where several are there and none was named."""
    configuration: Configuration | None = None
    configuration_error: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The engine's variables."""
    environment_source: str = ""
    """Where those were read."""
    unit: Mapping[str, str] = field(default_factory=dict)
    """Properties of its systemd unit; empty without one."""
    health: Mapping[str, Any] | None = None
    """The agent's /health; None where it does not answer."""
    plan: Mapping[str, Any] | None = None
    """The agent's /plan."""
    engine_metrics: str = ""

    @property
    def settings(self) -> Settings | None:
        """Its settings; None where they could not be read."""
        return self.configuration.settings if self.configuration else None

    @property
    def state(self) -> str:
        """As the agent names it; empty where no agent answers."""
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
    """As ext4, tmpfs."""
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class System:
    """The machine around the GPU."""

    is_nixos: bool = False
    glibc: str = ""
    """Version; empty where there is none."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """/proc/meminfo, bytes."""
    cpu_flags: frozenset[str] = frozenset()
    """Instruction-set flags of the first CPU; empty where they cannot be read."""
    huge_pages: str = ""
    """always, madvise or never."""
    governor: str = ""
    """CPU frequency governor; empty where the kernel has none (a virtual machine)."""
    memory_limit: int | None = None
    """Bytes that the cgroup allows; None: no limit."""
    cpu_limit: float | None = None
    """CPUs that the cgroup allows; None: no limit."""
    limits_of: str = ""
    """Whose cgroup those two are of."""
    open_files: int | None = None
    """Hard limit of open files; None where it is unknown."""
    listening: frozenset[int] = frozenset()
    """TCP ports that something listens on."""
    clock_synchronised: bool | None = None
    """None where nobody can tell."""
    unix_time: float = 0.0
    cache: Mount | None = None
    """Where prepared models go."""
    cuda_cache: Mount | None = None
    """Where the driver keeps kernels that it compiled; None where the folder is unknown."""
    cuda_cache_folder: str = ""
    cuda_cache_writable: bool = False


@dataclass(frozen=True, slots=True)
class Logs:
    """Lines of the journal; None where it cannot be read."""

    kernel: tuple[str, ...] | None = None
    """This boot's, of the GPU driver and of memory shortage."""
    unit: tuple[str, ...] | None = None
    """The instance's last thousand."""


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that the checks judge."""

    driver: Driver = Driver()
    nvml: Reading | None = None
    """None where no driver is there to be asked."""
    gpus: tuple[Gpu, ...] = ()
    libcuda: str = ""
    """Path of libcuda.so.1; empty: not found."""
    nvcc: str = ""
    """Release of the CUDA toolkit on PATH or under CUDA_PATH, as 11.8; empty: none."""
    system: System = System()
    engine: EngineFacts = EngineFacts()
    model: ModelFacts = ModelFacts()
    instance: Instance = Instance()
    logs: Logs = Logs()
    plan: Plan | None = None
    """Of the settings on this host's card; None where none could be made."""
    plan_error: str = ""
    """Why none could be made, where something is not known."""
    plan_refusal: str = ""
    """Why the settings cannot serve the model; empty: they can, as far as is known."""

    @property
    def settings(self) -> Settings | None:
        """The instance's settings; None where they could not be read."""
        return self.instance.settings

    @property
    def wants_gpu(self) -> bool:
        """Whether the model is to run on a GPU, as far as is known."""
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
