"""Where an instance runs: which devices, in which number type, with how much free memory, on which NUMA node.

`serve`, `plan` and `doctor` ask `place`, with the same questions about a host in `HostFacts`: this machine, or one that
was recorded. What an engine is started with follows from the answer and is decided nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cards import card_for_device, load_card, unknown_card
from pascaline.engines.plan_request import UNKNOWN_RATES, HostRates
from pascaline.errors import ConfigurationError, MissingError
from pascaline.gpu.devices import BUS_ORDER, DEVICE_ORDER, VISIBLE_DEVICES, device_variables, visible_gpus
from pascaline.gpu.memory import DeviceMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pascaline.cards import Card
    from pascaline.gpu.devices import GpuIdentity
    from pascaline.gpu.host_bandwidth import HostBandwidth
    from pascaline.settings import Settings

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
"""CPU flags with which torch multiplies bfloat16 in hardware (Linux, arch/x86/include/asm/cpufeatures.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Questions about a host. Each is a callable, so that only those that are needed are asked."""

    environment: Mapping[str, str]
    """Variables of the process that starts the engine; those of the settings override them."""
    installed: Callable[[], Sequence[str]]
    """Model names of the GPUs that the driver's folder lists, in the order of the bus."""
    gpu_memory: Callable[[str | None], DeviceMemory]
    """Memory of the first GPU that CUDA_VISIBLE_DEVICES shows. Raises MissingError if NVML does not report it, and
    ConfigurationError if the variable shows no GPU."""
    host_memory: Callable[[], DeviceMemory]
    """Memory that is available on the host."""
    cpu_flags: Callable[[], frozenset[str]]
    driver_gpus: Callable[[], Sequence[GpuIdentity]] = tuple
    """The GPUs that the driver's folder lists; asked if NVML fails."""
    numa_node: Callable[[str], int | None] = lambda _: None
    """NUMA node of a PCI address; None if the host has none or does not report it."""
    node_cpus: Callable[[int], frozenset[int]] = lambda _: frozenset()
    """CPUs of a NUMA node; empty if the host does not report them."""
    socket_nodes: Callable[[int], tuple[int, ...]] = lambda node: (node,)
    """NUMA nodes of the socket of a node, itself among them; several if the firmware divides sockets."""
    cores: Callable[[frozenset[int]], int] = len
    """Number of cores of these CPUs."""
    cpus: Callable[[], frozenset[int]] = frozenset
    """CPUs that an engine may use; empty if that is unknown."""
    bandwidth: Callable[[], HostBandwidth | None] = lambda: None
    """What `pascaline plan --measure-host` has found on this host; None if it was not measured."""
    link_rate: Callable[[str], float | None] = lambda _: None
    """Bytes per second that pinned memory reaches a PCI address with; None if the kernel does not report its link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where an instance runs."""

    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """`float16`, `bfloat16` or `float32`."""
    card: Card
    memory: DeviceMemory
    """The device's total memory, and the part that others use."""
    gpus: tuple[GpuIdentity, ...] = ()
    """The GPUs that the engine uses; empty on the CPU, and if neither NVML nor the driver's folder reports them."""
    host_memory_bytes: int | None = None
    """Free memory of the host; None: unknown, as for a card profile."""
    host_rates: HostRates = UNKNOWN_RATES
    numa_node: int | None = None
    """The NUMA node of the first GPU; None if the host has one node only, or the node is unknown."""
    numa_nodes: tuple[int, ...] = ()
    """The NUMA nodes of the CPUs that the engine is bound to: those of the sockets of its GPUs."""
    cpus: frozenset[int] = frozenset()
    """CPUs that the engine is bound to, those beside its GPUs; empty: it may use every CPU that this process may."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Variables that select the engine's devices."""
    notes: tuple[str, ...] = ()
    """Remarks about the choice for the reader of the plan."""

    def to_json(self) -> dict[str, object]:
        """Return it for `/plan` and `pascaline plan --json`."""
        gpus = [{"index": gpu.index, "uuid": gpu.uuid, "address": gpu.address} for gpu in self.gpus]
        return {"device": self.device, "gpus": gpus, "numa_node": self.numa_node} | {
            "cpus": sorted(self.cpus),
            "variables": dict(self.variables),
        }


def place(settings: Settings, card: str | None, host: HostFacts) -> Placement:
    """Decide where an instance with these settings runs on a host. card: the profile that the settings start from.

    Raises ConfigurationError if settings, variables and host contradict each other, MissingError if the GPU's
    memory is not known at all.
    """
    variables = {**host.environment, **settings.environment}
    device = choose_device(settings, host.installed, variables)
    if device == "cpu":
        dtype = choose_dtype(settings, card, device, host.cpu_flags)
        return Placement(
            device=device,
            dtype=dtype,
            card=load_card("cpu"),
            memory=host.host_memory(),
            variables=device_variables(device),
        )
    _check_order(variables)
    found, memory, doubt = _gpu(settings, host, variables.get(VISIBLE_DEVICES))
    gpus, notes = _used(settings, memory, variables.get(VISIBLE_DEVICES))
    nodes = [host.numa_node(gpu.address) if gpu.address else None for gpu in gpus]
    sockets = [() if node is None else host.socket_nodes(node) for node in nodes]
    cpus = _cpus_beside(sockets, settings.threads, host)
    bound_to = tuple(sorted(frozenset().union(*sockets))) if cpus else ()
    return Placement(
        device=device,
        dtype=choose_dtype(settings, card, device, host.cpu_flags),
        card=found,
        memory=memory,
        gpus=gpus,
        host_memory_bytes=host.host_memory().total_bytes,
        host_rates=replace(
            _host_rates(host, gpus, bound_to), cores=settings.threads or host.cores(cpus or host.cpus()) or None
        ),
        numa_node=nodes[0] if nodes else None,
        numa_nodes=bound_to,
        cpus=cpus,
        variables=device_variables(device, gpus),
        notes=(*notes, *([doubt] if doubt else [])),
    )


def place_on_card(settings: Settings, card: Card) -> Placement:
    """Return the placement on a card as its profile describes it, for plans without the hardware."""
    device = "cuda" if settings.device == "auto" else settings.device
    return Placement(
        device=device,
        dtype=choose_dtype(settings, card.name, device, frozenset),
        card=card,
        memory=DeviceMemory(card.name, card.memory_bytes),
    )


def choose_device(settings: Settings, installed: Callable[[], Sequence[str]], variables: Mapping[str, str]) -> str:
    """Return cpu or cuda. A card profile requires its GPU: without it this is an error, not a slow start on the CPU.

    `auto` is the CPU if there is no GPU, or if CUDA_VISIBLE_DEVICES hides all of them.
    """
    if settings.device == "cpu":
        return "cpu"
    visible = variables.get(VISIBLE_DEVICES)
    hidden = visible is not None and visible.strip() in {"", "-1"}
    if settings.device == "auto":
        return "cpu" if hidden or not installed() else "cuda"
    if hidden and installed():
        raise ConfigurationError(
            f"device: cuda is wanted, but {VISIBLE_DEVICES}={visible} hides every GPU; name one, or set device to cpu"
        )
    return settings.device


def choose_dtype(settings: Settings, card: str | None, device: str, cpu_flags: Callable[[], frozenset[str]]) -> str:
    """Return the type of the computation: float16 on a GPU, bfloat16 on a CPU that multiplies it, else float32."""
    if settings.dtype != "auto":
        if settings.dtype == "bfloat16" and device == "cuda" and card and load_card(card).compute_capability:
            raise ConfigurationError(f"dtype: bfloat16 is emulated on {card}, must be one of: float16, float32")
        return settings.dtype
    if device == "cuda":
        return "float16"
    return "bfloat16" if cpu_flags() & BFLOAT16_FLAGS else "float32"


def cpu_flags(cpu_info: str) -> frozenset[str]:
    """Return the instruction-set flags of the first CPU in the text of /proc/cpuinfo; empty if it has none."""
    flags = next((line for line in cpu_info.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _cpus_beside(sockets: Sequence[Sequence[int]], threads: int | None, host: HostFacts) -> frozenset[int]:
    """Return the usable CPUs of the GPUs' sockets: copies to a GPU of another socket cross the link between the two.

    sockets: for each GPU the NUMA nodes of its socket, none if its node is unknown.

    Empty, which binds to nothing, if a node is unknown, if these are all usable CPUs or none of them, or if `threads`
    asks for more CPUs than there are. The kernel allocates memory on the node where a thread runs.
    """
    known = [frozenset[int]().union(*map(host.node_cpus, nodes)) for nodes in sockets if nodes]
    usable = host.cpus()
    found = usable.intersection(*[frozenset().union(*known)])
    if len(known) < len(sockets) or not all(known) or found == usable or len(found) < (threads or 1):
        return frozenset()
    return found


def _host_rates(host: HostFacts, gpus: Sequence[GpuIdentity], nodes: Sequence[int]) -> HostRates:
    """nodes: those that the engine is bound to; none if it is not, so that the slowest one counts."""
    links = [rate for gpu in gpus[:1] if gpu.address and (rate := host.link_rate(gpu.address)) is not None]
    link = links[0] if links else None
    measured = host.bandwidth()
    if measured is None:
        return HostRates(link_bytes_per_second=link)
    found = measured.of_nodes(nodes)
    numbers, threads = " and ".join(str(node.node) for node in found), sum(node.threads for node in found)
    return HostRates(
        memory_bytes_per_second=sum(node.bytes_per_second for node in found),
        link_bytes_per_second=link,
        source=f"measured {measured.measured_at[:10]}, NUMA node {numbers}, {threads} threads",
    )


def _check_order(variables: Mapping[str, str]) -> None:
    """Refuse an order of the GPUs in which an index means one card to the plan and another to the engine."""
    order, visible = variables.get(DEVICE_ORDER), variables.get(VISIBLE_DEVICES)
    if order is None or order == BUS_ORDER:
        return
    if visible is not None and all(part.strip().lower().startswith("gpu-") for part in visible.split(",")):
        return
    raise ConfigurationError(
        f"{DEVICE_ORDER}={order} numbers the GPUs otherwise than the plan does, must be {BUS_ORDER} or left out; "
        f"or name the GPU by its UUID in {VISIBLE_DEVICES} (nvidia-smi -L)"
    )


def _gpu(settings: Settings, host: HostFacts, visible: str | None) -> tuple[Card, DeviceMemory, str | None]:
    """Return the first GPU that the engine sees, its memory, and why that is in doubt (None: it is certain).

    If NVML fails but the card is known, its profile is used instead: a missing reading
    must not keep an instance down.
    """
    try:
        memory = host.gpu_memory(visible)
    except MissingError as error:
        first = next(iter(host.installed()), None)
        if first is None:
            raise ConfigurationError(
                "device: cuda is wanted, but the NVIDIA driver shows no GPU; check nvidia-smi, or set device to cpu"
            ) from error
        detected = card_for_device(first)
        card = load_card(settings.card) if settings.card else detected
        if card is None or not card.memory_bytes:
            raise
        stand_in = DeviceMemory(card.name, card.memory_bytes, gpus=_visible(host.driver_gpus(), visible))
        return card, stand_in, f"planned as if nothing else used the card: {error}"
    known = card_for_device(memory.name)
    if known is not None:
        return known, memory, None
    doubt = f"no profile knows {memory.name}: " + (
        "its speed is estimated from the clocks, bus width and cores that NVML reports"
        if memory.rates
        else "its speed is unknown, and its memory is all that is planned with"
    )
    return unknown_card(memory.name, memory.total_bytes, memory.rates), memory, doubt


def _visible(gpus: Sequence[GpuIdentity], visible: str | None) -> tuple[GpuIdentity, ...]:
    """Return the visible ones among the known GPUs; empty if none is known."""
    return tuple(visible_gpus(gpus, visible)) if gpus else ()


def _used(
    settings: Settings, memory: DeviceMemory, visible: str | None
) -> tuple[tuple[GpuIdentity, ...], tuple[str, ...]]:
    """Return the GPUs that the engine uses, and a note if they are fewer than CUDA_VISIBLE_DEVICES names."""
    needed = settings.tensor_parallel * settings.pipeline_parallel
    seen = memory.gpus
    if seen and needed > len(seen):
        raise ConfigurationError(
            f"tensor_parallel x pipeline_parallel needs {needed} GPUs, {len(seen)} visible: "
            f"{', '.join(map(str, seen))}; name more in {VISIBLE_DEVICES}, or set both to 1"
        )
    used = seen[:needed]
    if visible is None or len(seen) == len(used):
        return used, ()
    return used, (f"{VISIBLE_DEVICES}={visible} shows {len(seen)} GPUs, used: {', '.join(map(str, used))}",)
