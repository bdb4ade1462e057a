"""What the kernel and the loader report about the GPUs and their driver. Nothing here calls the driver."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from pascaline.cards import card_for_device
from pascaline.doctor.host import NVIDIA_VENDOR, Driver, Gpu, GpuProcess, Node, PciGpu
from pascaline.gpu.devices import PROC_GPUS, driver_gpus
from pascaline.gpu.memory import numa_node, parse_cpus
from pascaline.gpu.processes import identify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pascaline.doctor.machine import Machine
    from pascaline.gpu.reading import DeviceReading

_DISPLAY_CLASSES = ("0x0300", "0x0302")
"""VGA and 3D controllers."""
_LIBCUDA = "libcuda.so.1"
_LIBRARY_FOLDERS = ("/run/opengl-driver/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib")


def collect_driver(machine: Machine) -> Driver:
    """Read the kernel's facts about NVIDIA's hardware and driver, without calling the driver."""
    text = machine.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+\.[\d.]+)", text)
    loaded = {line.split()[0] for line in (machine.read("/proc/modules") or "").splitlines() if line.strip()}
    return Driver(
        version=match[1] if match else "",
        is_open="Open Kernel Module" in text,
        modules=frozenset(name for name in loaded if name.startswith("nvidia") or name == "nouveau"),
        pci=tuple(_pci_gpus(machine)),
        nodes=_nodes(machine),
        models=tuple(gpu.name for gpu in driver_gpus(machine.path(PROC_GPUS))),
    )


def _pci_gpus(machine: Machine) -> Iterator[PciGpu]:
    bus = "/sys/bus/pci/devices"
    for address in machine.list(bus):
        read = {name: (machine.read(f"{bus}/{address}/{name}") or "").strip() for name in ("vendor", "device", "class")}
        if read["vendor"] == NVIDIA_VENDOR and read["class"].startswith(_DISPLAY_CLASSES):
            link = machine.path(f"{bus}/{address}/driver")
            bound = link.readlink().name if link.is_symlink() else ""
            yield PciGpu(address, read["device"], bound, numa_node(address.rpartition(".")[0], machine.path(bus)))


def _nodes(machine: Machine) -> dict[str, Node]:
    nodes = {}
    for name in machine.list("/dev"):
        if re.fullmatch(r"nvidia(\d+|ctl|-uvm|-uvm-tools|-modeset)", name):
            path = machine.path(f"/dev/{name}")
            accessible = os.access(path, os.R_OK | os.W_OK)
            nodes[f"/dev/{name}"] = Node(stat.S_IMODE(path.stat().st_mode), accessible)
    return nodes


def collect_gpu(machine: Machine, device: DeviceReading) -> Gpu:
    """Combine NVML's answers about a GPU with its card profile, and add the names of its processes."""
    name = str(device.values.get("nvmlDeviceGetName", "")).removeprefix("NVIDIA ")
    calls = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    found = [pair for call in calls for pair in _pairs(device.values.get(call))]
    return Gpu(device, card_for_device(name), tuple(_process(machine, pid, size) for pid, size in found))


def _pairs(value: object) -> list[tuple[int, int | None]]:
    return [(item[0], item[1]) for item in value if isinstance(item, list)] if isinstance(value, list) else []


def _process(machine: Machine, pid: int, size: int | None) -> GpuProcess:
    identity = identify(pid, machine.path("/proc"))
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", machine.read(f"/proc/{pid}/status") or "", re.MULTILINE)
    return GpuProcess(pid, size, identity.name, identity.unit, parse_cpus(match[1]) if match else frozenset())


def find_libcuda(machine: Machine, environment: Mapping[str, str]) -> str:
    """Return libcuda's path as the loader finds it: in the engine's path, the cache or the distributions' folders."""
    named = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in named:
        if machine.path(f"{folder}/{_LIBCUDA}").exists():
            return f"{folder}/{_LIBCUDA}"
    output = machine.run("ldconfig", ["ldconfig", "-p"])
    match = re.search(rf"^\s*{re.escape(_LIBCUDA)} .*=> (\S+)$", output.text if output else "", re.MULTILINE)
    if match:
        return match[1]
    return next((f"{f}/{_LIBCUDA}" for f in _LIBRARY_FOLDERS if machine.path(f"{f}/{_LIBCUDA}").exists()), "")


def nvcc_release(machine: Machine) -> str:
    """Return the release of the CUDA toolkit under CUDA_PATH or on PATH; empty without a toolkit."""
    folder = machine.environment.get("CUDA_PATH") or machine.environment.get("CUDA_HOME")
    output = machine.run("nvcc", [f"{folder}/bin/nvcc" if folder else "nvcc", "--version"])
    match = re.search(r"release (\d+\.\d+)", output.text if output else "")
    return match[1] if match else ""
