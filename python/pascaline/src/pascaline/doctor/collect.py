"""Collects a Host from a machine: one function a part, each of which stands what is missing, broken or slow."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import stat
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pascaline.cards import card_for_device, load_card
from pascaline.configuration import load
from pascaline.doctor.host import (
    NVIDIA_VENDOR,
    Driver,
    EngineFacts,
    Gpu,
    GpuProcess,
    Host,
    Instance,
    Logs,
    ModelFacts,
    Mount,
    Node,
    PciGpu,
    System,
)
from pascaline.engines.client import reachable
from pascaline.errors import ConfigurationError, PascalineError
from pascaline.gpu.processes import identify
from pascaline.models import store
from pascaline.models.gguf import open_gguf
from pascaline.models.reader import read_model
from pascaline.planning.plan import make_plan
from pascaline.planning.request import request_from_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pascaline.doctor.machine import Machine
    from pascaline.gpu.reading import DeviceReading
    from pascaline.planning.plan import Plan
    from pascaline.settings import Settings

PROBE = Path(__file__).with_name("engine_probe.py")
PROBE_SECONDS = 120.0
"""Importing torch from a cold disk takes most of a minute."""
UNIT_PREFIX = "pascaline-"
NOT_INSTANCES = ("exporter", "router", "gpu-limits", "model-gc")
"""Units of ours that serve no model; those that fetch one are `model-<name>`."""
UNIT_PROPERTIES = ("LoadState", "ActiveState", "SubState", "NRestarts", "MainPID", "ExecStart", "Environment")
_DISPLAY_CLASSES = ("0x0300", "0x0302")
"""VGA and 3D controllers."""
_LIBCUDA = "libcuda.so.1"
_LIBRARY_FOLDERS = ("/run/opengl-driver/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib")
_KERNEL_LINES = "NVRM|Xid|[Oo]ut of memory|oom-kill|AER:|nouveau"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about."""

    instance: str | None = None
    """Name of an instance, URL of its agent, or its TOML file; None: the only one of this host, or none."""
    config_file: Path | None = None
    flags: Mapping[str, Any] | None = None
    """Settings given on the command line."""


def collect(machine: Machine, question: Question, on_part: Callable[[str], None] = lambda _: None) -> Host:
    """Collect everything; `on_part` is told what is being looked at."""
    on_part("instance")
    instance = collect_instance(machine, question)
    _note_settings(machine, instance)
    on_part("driver")
    driver = _standing(machine, "driver", lambda: collect_driver(machine), Driver())
    reading = machine.reading() if driver.version or driver.pci or driver.nodes else None
    devices = reading.devices if reading else ()
    on_part("engine")
    engine = _standing(machine, "engine", lambda: collect_engine(machine, instance), EngineFacts())
    on_part("model")
    model = _standing(machine, "model", lambda: collect_model(machine, instance.settings), ModelFacts())
    on_part("system")
    host = Host(
        driver=driver,
        nvml=reading,
        gpus=_standing(machine, "GPUs", lambda: tuple(_gpu(machine, device) for device in devices), ()),
        libcuda=_find_libcuda(machine, instance.environment),
        nvcc=_nvcc_release(machine),
        system=_standing(machine, "system", lambda: collect_system(machine, instance), System()),
        engine=engine,
        model=model,
        instance=instance,
        logs=_standing(machine, "logs", lambda: collect_logs(machine, instance.name), Logs()),
    )
    no_plan: tuple[Plan | None, str] = (None, "the planner failed; pascaline doctor --report tells why")
    plan, plan_error = _standing(machine, "plan", lambda: _plan(host), no_plan)
    return replace(host, plan=plan, plan_error=plan_error)


Part = TypeVar("Part")


def _standing(machine: Machine, name: str, collect_part: Callable[[], Part], nothing: Part) -> Part:
    """Return a part, or nothing of it where this program met what it was not made for: the rest must still be told."""
    try:
        return collect_part()
    except Exception:
        machine.transcript.append((f"failed to collect: {name}", traceback.format_exc()))
        return nothing


def _note_settings(machine: Machine, instance: Instance) -> None:
    """Keep for the report what the instance runs with."""
    lines = [f"{name}={value}" for name, value in sorted(instance.environment.items())]
    machine.transcript.append((f"environment of {instance.environment_source}", "\n".join(lines)))
    if instance.configuration is not None:
        document = instance.configuration.settings.model_dump_json(indent=1)
        machine.transcript.append(("settings", f"{document}\n{json.dumps(instance.configuration.origins, indent=1)}"))


# The driver and the GPUs


def collect_driver(machine: Machine) -> Driver:
    """Read what the kernel knows of NVIDIA's hardware and driver, without a call into the driver."""
    text = machine.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+\.[\d.]+)", text)
    loaded = {line.split()[0] for line in (machine.read("/proc/modules") or "").splitlines() if line.strip()}
    return Driver(
        version=match[1] if match else "",
        is_open="Open Kernel Module" in text,
        modules=frozenset(name for name in loaded if name.startswith("nvidia") or name == "nouveau"),
        pci=tuple(_pci_gpus(machine)),
        nodes=_nodes(machine),
    )


def _pci_gpus(machine: Machine) -> Iterator[PciGpu]:
    bus = "/sys/bus/pci/devices"
    for address in machine.list(bus):
        read = {name: (machine.read(f"{bus}/{address}/{name}") or "").strip() for name in ("vendor", "device", "class")}
        if read["vendor"] == NVIDIA_VENDOR and read["class"].startswith(_DISPLAY_CLASSES):
            link = machine.path(f"{bus}/{address}/driver")
            yield PciGpu(address, read["device"], link.readlink().name if link.is_symlink() else "")


def _nodes(machine: Machine) -> dict[str, Node]:
    nodes = {}
    for name in machine.list("/dev"):
        if re.fullmatch(r"nvidia(\d+|ctl|-uvm|-uvm-tools|-modeset)", name):
            path = machine.path(f"/dev/{name}")
            accessible = os.access(path, os.R_OK | os.W_OK)
            nodes[f"/dev/{name}"] = Node(stat.S_IMODE(path.stat().st_mode), accessible)
    return nodes


def _gpu(machine: Machine, device: DeviceReading) -> Gpu:
    name = str(device.values.get("nvmlDeviceGetName", "")).removeprefix("NVIDIA ")
    calls = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    found = [pair for call in calls for pair in _pairs(device.values.get(call))]
    return Gpu(device, card_for_device(name), tuple(_process(machine, pid, size) for pid, size in found))


def _pairs(value: object) -> list[tuple[int, int | None]]:
    return [(item[0], item[1]) for item in value if isinstance(item, list)] if isinstance(value, list) else []


def _process(machine: Machine, pid: int, size: int | None) -> GpuProcess:
    identity = identify(pid, machine.path("/proc"))
    return GpuProcess(pid, size, identity.name, identity.unit)


def _find_libcuda(machine: Machine, environment: Mapping[str, str]) -> str:
    """Return where the loader finds it: the engine's own path, else the cache, else where distributions put it."""
    named = [folder for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in named:
        if machine.path(f"{folder}/{_LIBCUDA}").exists():
            return f"{folder}/{_LIBCUDA}"
    output = machine.run("ldconfig", ["ldconfig", "-p"])
    match = re.search(rf"^\s*{re.escape(_LIBCUDA)} .*=> (\S+)$", output.text if output else "", re.MULTILINE)
    if match:
        return match[1]
    return next((f"{f}/{_LIBCUDA}" for f in _LIBRARY_FOLDERS if machine.path(f"{f}/{_LIBCUDA}").exists()), "")


def _nvcc_release(machine: Machine) -> str:
    folder = machine.environment.get("CUDA_PATH") or machine.environment.get("CUDA_HOME")
    output = machine.run("nvcc", [f"{folder}/bin/nvcc" if folder else "nvcc", "--version"])
    match = re.search(r"release (\d+\.\d+)", output.text if output else "")
    return match[1] if match else ""


# The instance


def collect_instance(machine: Machine, question: Question) -> Instance:
    """Find the instance that is asked about: its settings, its variables, and what it says of itself."""
    asked = question.instance
    if asked and asked.startswith(("http://", "https://")):
        return _answers(machine, Instance(name=asked), asked.rstrip("/"), None)
    if asked and (asked.endswith(".toml") or "/" in asked):
        return _from_settings(machine, Instance(), Path(asked), question.flags, machine.environment)
    names = [asked] if asked else _instances(machine)
    if len(names) == 1:
        return _from_unit(machine, names[0], question, must_exist=asked is not None)
    found = Instance(others=tuple(names))
    return _from_settings(machine, found, question.config_file, question.flags, machine.environment)


def _instances(machine: Machine) -> list[str]:
    command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", f"{UNIT_PREFIX}*.service"]
    output = machine.run("systemctl-list-units", command)
    units = [line.split()[0] for line in (output.text if output else "").splitlines() if line.strip()]
    names = [unit.removeprefix(UNIT_PREFIX).removesuffix(".service") for unit in units]
    return [name for name in names if name not in NOT_INSTANCES and not name.startswith("model-")]


def _from_unit(machine: Machine, name: str, question: Question, *, must_exist: bool) -> Instance:
    unit = f"{UNIT_PREFIX}{name}.service"
    properties = _unit_properties(machine, unit)
    if must_exist and properties.get("LoadState") != "loaded":
        raise ConfigurationError(
            f"--instance: no unit {unit} on this host, must be an instance's name, its agent's URL or its TOML file"
        )
    variables = dict(part.partition("=")[::2] for part in shlex.split(properties.get("Environment", "")))
    match = re.search(r"--config[ =](\S+)", properties.get("ExecStart", ""))
    instance = Instance(name=name, unit=properties)
    file = Path(match[1]) if match else question.config_file
    return _from_settings(machine, instance, file, question.flags, variables, f"the unit {unit}")


def _unit_properties(machine: Machine, unit: str) -> dict[str, str]:
    command = ["systemctl", "show", unit, *(f"--property={name}" for name in UNIT_PROPERTIES)]
    output = machine.run("systemctl-show", command)
    return dict(line.partition("=")[::2] for line in (output.text if output else "").splitlines() if "=" in line)


def _from_settings(
    machine: Machine,
    instance: Instance,
    file: Path | None,
    flags: Mapping[str, Any] | None,
    variables: Mapping[str, str],
    source: str = "this process",
) -> Instance:
    try:
        located = machine.path(file) if file is not None and file.is_absolute() else file
        configuration = load(flags, located, variables, check_host=False)
    except ConfigurationError as error:
        return replace(instance, configuration_error=str(error), environment=variables, environment_source=source)
    settings = configuration.settings
    instance = replace(
        instance,
        configuration=configuration,
        environment={**variables, **settings.environment},
        environment_source=source,
    )
    agent = _url(settings.agent_host, settings.agent_port)
    return _answers(machine, instance, agent, _url(settings.host, settings.port))


def _url(host: str, port: int) -> str:
    host, port = reachable((host, port))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(machine: Machine, instance: Instance, agent: str, engine: str | None) -> Instance:
    health = _json(machine.fetch(f"{agent}/health"))
    if health is None or "state" not in health:
        return instance
    return replace(
        instance,
        health=health,
        plan=_json(machine.fetch(f"{agent}/plan")),
        engine_metrics=(machine.fetch(f"{engine}/metrics") or "") if engine else "",
    )


def _json(text: str | None) -> dict[str, Any] | None:
    try:
        found = json.loads(text or "")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# The engine and the model


def collect_engine(machine: Machine, instance: Instance) -> EngineFacts:
    """Ask the Python that runs SGLang what it has, or llama-server for its version."""
    settings = instance.settings
    if settings is not None and settings.engine == "llama.cpp":
        return _llama_server(machine, str(settings.engine_executable or "llama-server"))
    python = str(settings.engine_executable) if settings and settings.engine_executable else sys.executable
    variables = sorted(name for name in instance.environment if name.startswith(("SGLANG_", "SGL_")))
    output = machine.run("engine-probe", [python, str(PROBE), *variables], timeout=PROBE_SECONDS)
    if output is None:
        return EngineFacts(error=f"failed to run {python}: there is no such program")
    answer = _json(output.text)
    if answer is None:
        last = next(reversed(output.errors.strip().splitlines()), f"exit code {output.code}")
        return EngineFacts(error=f"{python} gave no answer: {last}")
    return EngineFacts(
        error=str(answer.get("error", "")),
        versions=answer.get("versions", {}),
        torch_cuda=str(answer.get("torch_cuda", "")),
        torch_architectures=tuple(answer.get("torch_architectures", ())),
        supported_sglang=tuple(answer.get("supported_sglang", ())),
        kernel_architectures=tuple(answer.get("kernel_architectures", ())),
        kernel_formats=tuple(answer.get("kernel_formats", ())),
        entry_points=tuple(answer.get("entry_points", ())),
        unknown_variables=tuple(answer.get("unknown_variables", ())),
    )


def _llama_server(machine: Machine, program: str) -> EngineFacts:
    output = machine.run("llama-server", [program, "--version"])
    if output is None:
        return EngineFacts(error=f"failed to run {program}: there is no such program")
    match = re.search(r"^version: (.+)$", output.errors + output.text, re.MULTILINE)
    return EngineFacts(versions={"llama.cpp": match[1]}) if match else EngineFacts(error=f"{program} names no version")


def collect_model(machine: Machine, settings: Settings | None) -> ModelFacts:
    """Read the header, the tokeniser's presence, the checksum where one is required, and the speed of its disk."""
    if settings is None:
        return ModelFacts()
    try:
        named, _ = store.locate(settings)
        path = machine.path(named) if machine.root != Path("/") and not named.exists() else named
        spec = read_model(path)
        tokenizer, template = _tokenizer(path)
    except PascalineError as error:
        return ModelFacts(path=settings.model, error=str(error))
    checksum, checksum_error = _checksum(settings, path, machine.path(store.cache_folder(settings)))
    file = path if path.is_file() else Path(str(spec.files[0]))
    return ModelFacts(
        path=str(path),
        spec=spec,
        sha256=checksum,
        checksum_error=checksum_error,
        has_tokenizer=tokenizer,
        has_chat_template=template,
        read_bytes_per_second=machine.read_speed(file),
    )


def _tokenizer(path: Path) -> tuple[bool, bool]:
    """Return whether a model has a tokeniser and a chat template."""
    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        config = _json((path / "tokenizer_config.json").read_text()) if "tokenizer_config.json" in names else None
        template = bool(names & {"chat_template.jinja", "chat_template.json"}) or "chat_template" in (config or {})
        return bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"}), template
    with open_gguf(path) as header:
        metadata = header.metadata
        return "tokenizer.ggml.tokens" in metadata, "tokenizer.chat_template" in metadata


def _checksum(settings: Settings, path: Path, cache: Path) -> tuple[str | None, str]:
    """Return (sha256, error), remembered by the store; nothing where no checksum is required."""
    if settings.model_sha256 is None or path.is_dir():
        return None, ""
    try:
        return store.cached_sha256(path, cache), ""
    except (PascalineError, OSError) as error:
        return None, str(error)


def _plan(host: Host) -> tuple[Plan | None, str]:
    """Plan the model on this host's card beside what others hold of it; else (None, why not)."""
    settings, spec, configuration = host.settings, host.model.spec, host.instance.configuration
    if settings is None or spec is None or configuration is None:
        return None, ""
    gpu = next(iter(host.gpus), None)
    name = configuration.card or (gpu.card.name if gpu and gpu.card else None)
    if name is None:
        return None, "the card has no profile; see card-profile"
    card = load_card(name)
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and name != "cpu")
    dtype = settings.dtype if settings.dtype != "auto" else "float16" if on_gpu else "float32"
    total, used = _memory_of(gpu, card.memory_bytes) if on_gpu else (host.system.memory.get("MemAvailable", 0), 0)
    try:
        request = request_from_settings(
            settings, spec, device="cuda" if on_gpu else "cpu", dtype=dtype, card_bytes=total, used_bytes=used
        )
        return make_plan(spec, card, request), ""
    except PascalineError as error:
        return None, str(error)


def _memory_of(gpu: Gpu | None, profile_bytes: int) -> tuple[int, int]:
    """Return (total, used by programs that are not ours), bytes; the profile's where the driver does not tell."""
    if gpu is None or gpu.memory is None:
        return profile_bytes, 0
    total, _, used = gpu.memory
    ours = sum(process.bytes or 0 for process in gpu.processes if process.unit.startswith(UNIT_PREFIX))
    return total, max(0, used - ours)


# The system


def collect_system(machine: Machine, instance: Instance) -> System:
    """Read kernel, memory, limits, ports, clock and caches."""
    memory_limit, cpu_limit, whose = _cgroup_limits(machine, instance)
    folder = _cuda_cache(instance.environment)
    return System(
        is_nixos="ID=nixos" in (machine.read("/etc/os-release") or ""),
        glibc=_glibc(machine),
        memory=_memory(machine.read("/proc/meminfo") or ""),
        huge_pages=_chosen(machine.read("/sys/kernel/mm/transparent_hugepage/enabled") or ""),
        governor=(machine.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "").strip(),
        memory_limit=memory_limit,
        cpu_limit=cpu_limit,
        limits_of=whose,
        open_files=_open_files(machine, instance),
        listening=_listening(machine),
        clock_synchronised=_clock_synchronised(machine),
        unix_time=machine.now,
        cache=_mount(machine, store.cache_folder(instance.settings)) if instance.settings else None,
        cuda_cache=_mount(machine, Path(folder)) if folder else None,
        cuda_cache_folder=folder,
        cuda_cache_writable=bool(folder) and _is_writable(machine.path(folder)),
    )


def _memory(text: str) -> dict[str, int]:
    return {match[1]: int(match[2]) * 1024 for match in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _chosen(text: str) -> str:
    """Return the value in brackets: `always [madvise] never`."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def _glibc(machine: Machine) -> str:
    output = machine.run("getconf", ["getconf", "GNU_LIBC_VERSION"])
    return output.text.strip().removeprefix("glibc ") if output and output.code == 0 else ""


def _cgroup_limits(machine: Machine, instance: Instance) -> tuple[int | None, float | None, str]:
    """Return the tightest limits of memory and CPUs above the instance's process, or this one without an instance."""
    pid = instance.unit.get("MainPID", "0")
    whose, source = (f"the unit of {instance.name}", pid) if pid not in ("", "0") else ("this process", "self")
    match = re.search(r"^0::(/.*)$", machine.read(f"/proc/{source}/cgroup") or "", re.MULTILINE)
    if match is None:
        return None, None, whose
    parts = [part for part in match[1].split("/") if part]
    folders = ["/sys/fs/cgroup/" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    memory = [
        int(text) for folder in folders if (text := (machine.read(f"{folder}/memory.max") or "").strip()).isdigit()
    ]
    cpus = [limit for folder in folders if (limit := _cpus(machine.read(f"{folder}/cpu.max") or "")) is not None]
    return min(memory, default=None), min(cpus, default=None), whose


def _cpus(text: str) -> float | None:
    """CPUs of a cpu.max file: `QUOTA PERIOD` or `max PERIOD`."""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _open_files(machine: Machine, instance: Instance) -> int | None:
    pid = instance.unit.get("MainPID", "0")
    if pid in ("", "0"):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return None if limit == resource.RLIM_INFINITY or machine.root != Path("/") else limit
    match = re.search(r"^Max open files\s+\S+\s+(\d+)", machine.read(f"/proc/{pid}/limits") or "", re.MULTILINE)
    return int(match[1]) if match else None


def _listening(machine: Machine) -> frozenset[int]:
    """Return the ports in state LISTEN (0A) of /proc/net/tcp and tcp6."""
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (machine.read(table) or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[3] == "0A":
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(ports)


def _clock_synchronised(machine: Machine) -> bool | None:
    output = machine.run("timedatectl", ["timedatectl", "show", "--property=NTPSynchronized"])
    match = re.search(r"^NTPSynchronized=(yes|no)$", output.text if output else "", re.MULTILINE)
    return match[1] == "yes" if match else None


def _cuda_cache(environment: Mapping[str, str]) -> str:
    """Return the folder in which the driver keeps compiled kernels: as set, else its default under the home folder."""
    home = environment.get("HOME", "")
    return environment.get("CUDA_CACHE_PATH") or (f"{home}/.nv/ComputeCache" if home else "")


def _mount(machine: Machine, folder: Path) -> Mount | None:
    """Return the file system of a folder, or of its nearest parent that exists."""
    rows = [line.split() for line in (machine.read("/proc/self/mounts") or "").splitlines()]
    mounts = [(row[1].replace("\\040", " "), row[2]) for row in rows if len(row) > 2]
    holding = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    if not holding:
        return None
    # Of two mounts on one point the later hides the earlier.
    point, kind = max(enumerate(holding), key=lambda item: (len(item[1][0]), item[0]))[1]
    return Mount(point, kind, _free_bytes(machine.path(folder)))


def _free_bytes(folder: Path) -> int | None:
    for existing in (folder, *folder.parents):
        try:
            status = os.statvfs(existing)
        except OSError:
            continue
        return status.f_bavail * status.f_frsize
    return None


def _is_writable(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return os.access(existing, os.W_OK | os.X_OK)


# The logs


def collect_logs(machine: Machine, name: str) -> Logs:
    """Read what driver and memory shortage left in the kernel's log since the boot, and the instance's last lines."""
    kernel = machine.run(
        "journalctl-kernel",
        ["journalctl", "-k", "-b", "--no-pager", "-o", "short-iso", "-n", "2000", "-g", _KERNEL_LINES],
    )
    if kernel is None or "not seeing messages" in kernel.errors or "No journal files" in kernel.errors:
        kernel = machine.run("dmesg", ["dmesg", "--time-format=iso"])
    unit = None
    if name and "/" not in name:
        unit = machine.run(
            "journalctl-unit", ["journalctl", "-u", f"{UNIT_PREFIX}{name}", "--no-pager", "-o", "cat", "-n", "1000"]
        )
    return Logs(_lines(kernel, _KERNEL_LINES), _lines(unit, ""))


def _lines(output: Any, pattern: str) -> tuple[str, ...] | None:
    if output is None or (output.code not in (0, 1) or (output.code == 1 and output.errors.strip())):
        return None
    return tuple(line for line in output.text.splitlines() if re.search(pattern, line) and not line.startswith("-- "))
