"""Checks of the driver: the right branch and module, loaded, reachable, and of a single version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.cards import driver_branches
from pascaline.doctor.driver_messages import Refusal, refusals
from pascaline.doctor.verdicts import Checks, Remedy, Result, failure, ok, skipped, warning
from pascaline.gpu.reading import DeviceStatus, DriverStatus

if TYPE_CHECKING:
    from pascaline.doctor.host import Host

CHECKS = Checks("Driver")
check = CHECKS.check

LAST_PASCAL_BRANCH = driver_branches().last_pascal
LEAST_DRIVER = driver_branches().least
PASCAL_DEVICE_RANGES = ((0x15F0, 0x15FF), (0x1B00, 0x1D7F))
"""PCI numbers of GP100, and of GP102 to GP108 (pci.ids)."""

CONSEQUENCES = frozenset({"no-card", "probe-failed"})
"""Messages that only follow from others: if one of the others is there, these add nothing."""

_NO_GPU = "no NVIDIA GPU is on the PCI bus"


def _has_pascal(host: Host) -> bool:
    """Whether a Pascal card is present; without the driver's answer, by its PCI number."""
    if host.gpus:
        return bool(host.pascal)
    numbers = [int(gpu.device, 16) for gpu in host.driver.pci if gpu.device.startswith("0x")]
    return any(low <= number <= high for number in numbers for low, high in PASCAL_DEVICE_RANGES)


@check(
    "gpu-present",
    "A GPU is on the PCI bus",
    "reseat the card and its power cable, look for it in the firmware's list of PCI devices, then power-cycle the host",
    command="lspci -d 10de:",
)
def _gpu_present(host: Host) -> Result:
    """Looks for NVIDIA display and 3D controllers in /sys/bus/pci, which needs no driver. A container may hide them."""
    found = host.driver.pci
    if found:
        return ok(", ".join(f"{gpu.address} [10de:{gpu.device.removeprefix('0x')}]" for gpu in found))
    if host.driver.version:
        return ok("/sys/bus/pci lists no GPU here (a container?), but the driver is loaded")
    if host.settings and host.settings.device == "cuda":
        return failure(f"{_NO_GPU}, and the instance's device is cuda")
    return skipped(f"{_NO_GPU}; the model runs on the CPU")


@check(
    "driver-loaded",
    "NVIDIA's kernel module is loaded",
    "load the module; if it is not installed, install the driver of branch R580",
    command="modprobe nvidia; dmesg | grep -i nvrm | tail",
    option="hardware.pascaline.driver.enable = true;",
)
def _driver_loaded(host: Host) -> Result:
    """Reads /proc/driver/nvidia/version. A card without this module is invisible to CUDA and to the exporter."""
    if host.driver.version:
        return ok(f"driver {host.driver.version}")
    if not host.driver.pci:
        return skipped(_NO_GPU)
    bound = {gpu.driver for gpu in host.driver.pci if gpu.driver}
    return failure(f"no nvidia module is loaded; the card is bound to {', '.join(sorted(bound)) or 'no driver'}")


@check(
    "nouveau",
    "The open driver nouveau does not hold the card",
    "keep nouveau from loading, then restart the host",
    command="echo 'blacklist nouveau' > /etc/modprobe.d/nouveau.conf && update-initramfs -u && reboot",
    option="hardware.pascaline.driver.enable = true;",
)
def _nouveau(host: Host) -> Result:
    """Looks for nouveau in /proc/modules. It binds to the card before NVIDIA's module can, and CUDA cannot use it."""
    if "nouveau" in host.driver.modules:
        return failure("the module nouveau is loaded")
    return ok("the module nouveau is not loaded") if host.driver.pci else skipped(_NO_GPU)


@check(
    "driver-branch",
    "The driver's branch still drives the card",
    "install a driver of branch R580, the last that drives Pascal (the package's name is Ubuntu's)",
    command="apt install nvidia-driver-580",
    option='hardware.pascaline.driver.branch = "legacy_580";',
)
def _driver_branch(host: Host) -> Result:
    """Compares the loaded version with R580, the last branch for Pascal. A newer driver loads and ignores the card."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    if not _has_pascal(host):
        return skipped("no Pascal card was found")
    branch = host.driver.branch
    if branch > LAST_PASCAL_BRANCH:
        return failure(f"driver {host.driver.version} is newer than R{LAST_PASCAL_BRANCH} and ignores Pascal cards")
    return ok(f"driver {host.driver.version}, branch R{branch}")


@check(
    "driver-closed-module",
    "The kernel module is the closed one",
    "install the closed kernel module: the open one needs a GPU with GSP firmware, Turing or newer",
    command="apt install nvidia-kernel-dkms && apt remove nvidia-open-kernel-dkms && reboot",
    option="hardware.nvidia.open = false;",
)
def _closed_module(host: Host) -> Result:
    """Reads which kind of module is loaded. The open module loads and drives no Pascal card."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    if host.driver.is_open:
        kind = "the open kernel module is loaded"
        return failure(f"{kind}, and a Pascal card is here") if _has_pascal(host) else ok(f"{kind}; no Pascal card")
    return ok("the closed kernel module is loaded")


@check(
    "driver-library-match",
    "Driver library and kernel module have the same version",
    "restart the host: the driver was upgraded and the old module is still loaded",
    command="reboot",
)
def _library_match(host: Host) -> Result:
    """NVML refuses to work when its library and the loaded module differ, as after an upgrade without a restart."""
    if host.nvml is None:
        return skipped("no driver is loaded")
    if host.nvml.status is DriverStatus.VERSION_MISMATCH:
        return failure(f"{host.nvml.message} (module {host.driver.version})")
    library = str(host.nvml.library.get("nvmlSystemGetDriverVersion", ""))
    if library and host.driver.version and library != host.driver.version:
        return failure(f"the library has version {library}, the module {host.driver.version}")
    return ok(f"both are {library}") if library else skipped("NVML does not answer; see nvml")


@check(
    "driver-cuda",
    "The driver is new enough for torch's CUDA",
    "install a driver of branch R580, which runs what is built for CUDA 11 and 12 (the package's name is Ubuntu's)",
    command="apt install nvidia-driver-580",
    option='hardware.pascaline.driver.branch = "legacy_580";',
)
def _driver_cuda(host: Host) -> Result:
    """Compares the driver's branch with the oldest that runs programs of the CUDA release that torch was built for."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    if not host.engine.torch_cuda:
        return skipped("torch's CUDA version is unknown")
    least = LEAST_DRIVER.get(int(host.engine.torch_cuda.partition(".")[0]))
    if least is None:
        return skipped(f"the oldest driver for CUDA {host.engine.torch_cuda} is unknown")
    words = f"driver {host.driver.version}, torch for CUDA {host.engine.torch_cuda}, which needs R{least} or newer"
    return ok(words) if host.driver.branch >= least else failure(words)


@check(
    "device-nodes",
    "The GPUs' device nodes exist and this user may use them",
    "create the nodes, and let the user of the instance open them",
    command="nvidia-modprobe -c0; ls -l /dev/nvidia*",
    option="hardware.pascaline.driver.enable = true;",
)
def _device_nodes(host: Host) -> Result:
    """Looks for /dev/nvidiactl and one /dev/nvidiaN per GPU, and whether this user may read and write them."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    wanted = ["/dev/nvidiactl", *(f"/dev/nvidia{gpu.number('nvmlDeviceGetMinorNumber') or 0}" for gpu in host.gpus)]
    missing = [path for path in wanted if path not in host.driver.nodes]
    if missing:
        return failure(f"missing: {', '.join(missing)}")
    closed = [
        f"{path} ({host.driver.nodes[path].mode:04o})" for path in wanted if not host.driver.nodes[path].accessible
    ]
    if closed:
        return failure(
            f"this user may not open {', '.join(closed)}",
            Remedy("let the user open them: mode 0666, or the group that owns them", "chmod 0666 /dev/nvidia*"),
        )
    return ok(", ".join(wanted))


@check(
    "uvm",
    "CUDA's memory device /dev/nvidia-uvm exists",
    "load nvidia_uvm with the driver: a hardened unit may not load modules itself",
    command="modprobe nvidia_uvm && nvidia-modprobe -u -c0",
    option="hardware.pascaline.driver.enable = true;",
)
def _uvm(host: Host) -> Result:
    """Looks for /dev/nvidia-uvm. Without it nvidia-smi works, but every CUDA program says that there is no device."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    node = host.driver.nodes.get("/dev/nvidia-uvm")
    if node is None:
        loaded = "is loaded" if "nvidia_uvm" in host.driver.modules else "is not loaded"
        return failure(f"/dev/nvidia-uvm is missing, and the module nvidia_uvm {loaded}")
    if not node.accessible:
        return failure(f"this user may not open /dev/nvidia-uvm ({node.mode:04o})")
    return ok("/dev/nvidia-uvm is there")


@check(
    "nvml",
    "NVML answers",
    "see the driver's message; if a call hangs, the card is in a bad state: restart the host",
    command="timeout 10 nvidia-smi; journalctl -k -g 'NVRM|Xid' -n 50",
)
def _nvml(host: Host) -> Result:
    """Asks NVML everything that the exporter asks, in a process that is killed if a call does not return."""
    if host.nvml is None:
        return skipped("no driver is loaded")
    if not host.nvml.succeeded:
        return failure(f"{host.nvml.status.value}: {host.nvml.message}")
    return ok(f"{host.nvml.counted} GPU(s) in {host.nvml.duration:.2f} s")


@check(
    "gpu-lost",
    "Every GPU on the bus answers",
    "power-cycle the host: a warm reboot often does not bring a lost card back; then try another slot or cable. A card "
    "that ran hot may have switched itself off: give it air first",
    command="journalctl -k -g 'NVRM|Xid' -n 50",
)
def _gpu_lost(host: Host) -> Result:
    """Compares the cards on the bus with those that NVML counts, and asks each whether it is lost."""
    if host.nvml is None or not host.nvml.succeeded:
        return skipped("NVML does not answer; see nvml")
    ill = [gpu for gpu in host.gpus if gpu.reading.status is not DeviceStatus.OK]
    if ill:
        return failure("; ".join(f"{gpu.label} is {gpu.reading.status.value}: {gpu.reading.message}" for gpu in ill))
    if host.nvml.counted < len(host.driver.pci):
        words = f"{len(host.driver.pci)} on the bus, {host.nvml.counted} counted by NVML"
        refused = refusals(host.logs.kernel or ())
        return failure(words, refused[0].message.remedy if refused else None)
    return ok(f"{host.nvml.counted} of {len(host.driver.pci) or host.nvml.counted}") if host.gpus else skipped("no GPU")


@check(
    "persistence",
    "Persistence mode keeps the GPU initialised",
    "switch persistence on: without it each start of a program waits seconds for the card",
    command="systemctl enable --now nvidia-persistenced || nvidia-smi -pm 1",
    option="hardware.pascaline.driver.persistence = true;",
)
def _persistence(host: Host) -> Result:
    """Reads each GPU's persistence mode. Without it the card is torn down when its last program ends."""
    modes = {gpu.label: gpu.number("nvmlDeviceGetPersistenceMode") for gpu in host.gpus}
    known = {label: mode for label, mode in modes.items() if mode is not None}
    if not known:
        return skipped("no GPU reports its persistence mode")
    off = [label for label, mode in known.items() if not mode]
    return warning(f"off: {', '.join(off)}") if off else ok(f"on: {', '.join(known)}")


@check(
    "libcuda",
    "The engine finds libcuda.so.1",
    "put the folder of libcuda.so.1 into the instance's LD_LIBRARY_PATH",
    command="ldconfig -p | grep libcuda.so.1",
    option="hardware.graphics.enable = true;",
)
def _libcuda(host: Host) -> Result:
    """Searches the loader's folders: LD_LIBRARY_PATH, its cache, the folders of distributions. torch needs it."""
    if not host.driver.version:
        return skipped("no driver is loaded")
    return ok(host.libcuda) if host.libcuda else failure("no folder that the loader searches has libcuda.so.1")


@check(
    "cuda-toolkit",
    "A CUDA toolkit, if there is one, can build for Pascal",
    "use CUDA 11.8 to 12.9: 13.0 removed Pascal from the compiler and the libraries",
    command="nvcc --version",
    option="hardware.pascaline.cuda.enable = true;",
)
def _cuda_toolkit(host: Host) -> Result:
    """Asks nvcc for its release. Serving needs no toolkit; building kernels and nvprof do."""
    if not host.nvcc:
        return skipped("no nvcc on PATH or under CUDA_PATH; serving does not need it")
    if int(host.nvcc.partition(".")[0]) >= 13:
        return warning(f"nvcc {host.nvcc} cannot build for compute capability 6.x")
    return ok(f"nvcc {host.nvcc}")


@check(
    "driver-messages",
    "The kernel's log holds no refusal of this card by the driver",
    "read the whole message; it names the driver branch for the card, or the module that is in the way",
    command="journalctl -k -g NVRM -n 30",
)
def _driver_messages(host: Host) -> Result:
    """Searches this boot's kernel log for every known refusal by the driver, and gives the remedy for each."""
    if host.logs.kernel is None:
        return skipped("this user may not read the kernel's log; add it to the group systemd-journal")
    found = refusals(host.logs.kernel)
    if not found:
        return ok("none since the boot")
    words = "; ".join(f"{refusal.message.means}: {refusal.line}" for refusal in _causes(found))
    return failure(words, found[0].message.remedy)


def _causes(found: list[Refusal]) -> list[Refusal]:
    """Leave out the consequences if there is a cause."""
    return [refusal for refusal in found if refusal.message.id not in CONSEQUENCES] or found[:1]
