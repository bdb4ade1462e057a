"""The host's memory: NUMA nodes, modules in their slots, swap, and the kept measurement of its bandwidth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.doctor.evidence.system import cgroup_folders, unit_pid
from pascaline.doctor.host import HostMemory, MemorySlot, NumaNode
from pascaline.gpu.host_bandwidth import CPU_INFO, FILE, HostBandwidth, model_name, parse
from pascaline.gpu.memory import CPUS, NUMA_NODES, parse_cpus, socket_nodes
from pascaline.models.cache import cache_folder
from pascaline.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pascaline.doctor.host import Instance
    from pascaline.doctor.machine import Machine

_DEVICE = "Memory Device"
"""Heading of a slot in dmidecode's output (SMBIOS, type 17)."""
_SPEED = ("Configured Memory Speed", "Configured Clock Speed")
"""Newer and older name of the speed at which a module runs."""
_PRIVATE = re.compile(r"^\s*(Serial Number|Asset Tag):.*\n?", re.MULTILINE)
# NODE 0 CHANNEL 1 DIMM 0; P0_Node1_Channel2_Dimm0; CPU1_DIMM_A1; P1-DIMMA1; DIMM_A1
_NUMBERED = re.compile(r"(?:NODE|CPU|PROC|P)[ _-]?(\d+).*?CHANNEL[ _-]?(\w)", re.IGNORECASE)
_CHANNEL = re.compile(r"CHANNEL[ _-]?(\w)", re.IGNORECASE)
_LETTERED = re.compile(r"(?:(?:CPU|PROC|P)[ _-]?(\d+)[ _-]?)?DIMM[ _-]?([A-P])\d", re.IGNORECASE)


def collect_memory(machine: Machine, instance: Instance) -> HostMemory:
    """Read nodes, slots, swap and the kept measurement."""
    slots, error = _slots(machine)
    return HostMemory(
        nodes=_nodes(machine),
        slots=slots,
        slots_error=error,
        swapped_bytes=_swapped(machine, instance),
        bandwidth=_bandwidth(machine, instance),
    )


def _nodes(machine: Machine) -> tuple[NumaNode, ...]:
    names = machine.list(NUMA_NODES)
    numbers = sorted(int(name[4:]) for name in names if re.fullmatch(r"node\d+", name))
    found = []
    for number in numbers:
        folder = f"{NUMA_NODES}/node{number}"
        words = (machine.read(f"{folder}/distance") or "").split()
        # One column for each node that is online, in order.
        distances = {other: int(word) for other, word in zip(numbers, words, strict=False) if word.isdigit()}
        cpus = parse_cpus(machine.read(f"{folder}/cpulist") or "")
        socket = socket_nodes(number, machine.path(NUMA_NODES), machine.path(CPUS)) if cpus else ()
        found.append(NumaNode(number, cpus, distances, frozenset(socket)))
    return tuple(found)


def _slots(machine: Machine) -> tuple[tuple[MemorySlot, ...], str]:
    """Return the slots, or why they are unknown."""
    output = machine.run("dmidecode", ["dmidecode", "--type", "17"])
    if output is None:
        return (), "dmidecode is not installed"
    # The report shows the answer; serial numbers are nobody's business.
    question, answer = machine.transcript[-1]
    machine.transcript[-1] = (question, _PRIVATE.sub("", answer))
    blocks = [block for block in output.text.split("\n\n") if _DEVICE in block]
    if blocks:
        return tuple(map(_slot, blocks)), ""
    if output.code or "ermission denied" in output.text + output.errors:
        return (), "dmidecode may not read the firmware's tables; run pascaline doctor as root"
    return (), "the firmware describes no memory"


def _slot(block: str) -> MemorySlot:
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
    size = re.fullmatch(r"(\d+) ([kMGT]B)", fields.get("Size", ""))
    speed = next((fields[key] for key in _SPEED if re.match(r"\d", fields.get(key, ""))), "")
    return MemorySlot(fields.get("Locator", ""), _channel(fields), _bytes(*size.groups()) if size else 0, speed)


def _bytes(number: str, unit: str) -> int:
    """dmidecode writes kB, MB, GB and TB and means powers of two."""
    if unit == "TB":
        number, unit = str(int(number) * 1024), "GB"
    n_bytes = parse_bytes(f"{number} {unit[0]}iB")
    return n_bytes if isinstance(n_bytes, int) else 0


def _channel(fields: Mapping[str, str]) -> str:
    names = [fields.get("Bank Locator", ""), fields.get("Locator", "")]
    for name in (*names, " ".join(names)):
        if match := _NUMBERED.search(name):
            return f"{match[1]}/{match[2]}"
        if match := _LETTERED.search(name):
            return f"{match[1] or ''}/{match[2].upper()}"
    match = _CHANNEL.search(" ".join(names))
    return f"/{match[1]}" if match else ""


def _swapped(machine: Machine, instance: Instance) -> int | None:
    pid = unit_pid(instance)
    folders = cgroup_folders(machine, pid) if pid else []
    text = (machine.read(f"{folders[-1]}/memory.swap.current") or "").strip() if folders else ""
    return int(text) if text.isdigit() else None


def _bandwidth(machine: Machine, instance: Instance) -> HostBandwidth | None:
    """Look in the instance's cache folder, then where this user's commands keep theirs."""
    cpu = model_name(machine.read(CPU_INFO) or "")
    home = machine.environment.get("HOME")
    own = machine.environment.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else None)
    folders = [cache_folder(instance.settings)] if instance.settings else []
    folders += [Path(own) / "pascaline"] if own else []
    texts = [text for folder in folders if (text := machine.read(folder / FILE)) is not None]
    return next((found for text in texts if (found := parse(text, cpu)) is not None), None)
