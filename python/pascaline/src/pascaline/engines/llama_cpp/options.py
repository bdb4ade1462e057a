"""What a build of llama-server has: options, which come and go between versions, and devices."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.inherited import inherited

if TYPE_CHECKING:
    from collections.abc import Mapping

HELP_SECONDS = 30.0
_DEVICES = "Available devices:"
_DEVICE = re.compile(r"^\s+(\w+):", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def options_of(program: str) -> frozenset[str]:
    """Return the options that `program --help` lists; empty if it does not answer within HELP_SECONDS."""
    try:
        changed = Path(program).stat().st_mtime_ns
    except OSError:
        return frozenset()
    return _read(program, changed)


@lru_cache(maxsize=8)
def _read(program: str, changed: int) -> frozenset[str]:
    """changed: when the program was written, so that an updated one is asked again."""
    del changed
    try:
        done = subprocess.run(
            [program, "--help"], capture_output=True, text=True, errors="replace", timeout=HELP_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(_OPTION.findall(done.stdout))


def devices_of(program: str, variables: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the devices that `program --list-devices` names, as CUDA0; None if it names neither devices nor none.

    variables: those of the engine, which may hide GPUs.
    """
    try:
        done = subprocess.run(
            [program, "--list-devices"],
            capture_output=True, text=True, errors="replace", timeout=HELP_SECONDS, check=False,
            stdin=subprocess.DEVNULL, env={**inherited(), **variables},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    _, found, names = done.stdout.partition(_DEVICES)
    return tuple(_DEVICE.findall(names)) if found and done.returncode == 0 else None


def pinned_arguments(options: frozenset[str]) -> tuple[str, ...]:
    """Return the flags that hold the host's weights in pinned memory instead of mapping the file."""
    if "--load-mode" in options:
        return ("--load-mode", "none")
    return ("--no-mmap",) if "--no-mmap" in options else ()


def mapped_arguments(options: frozenset[str]) -> tuple[str, ...]:
    """Return the flags that keep a CPU's weights in the mapped file: it copies many of them to repack them."""
    return ("--no-repack",) if "--no-repack" in options else ()


def locked_arguments(options: frozenset[str]) -> tuple[str, ...]:
    """Return the flags that map the file and lock it in memory."""
    if "--load-mode" in options:
        return ("--load-mode", "mmap+mlock")
    return ("--mlock",) if "--mlock" in options else ()


def numa_arguments(options: frozenset[str], *, is_bound: bool, nodes: int = 1) -> tuple[str, ...]:
    """Return the flags for the host's NUMA nodes.

    An engine that is bound to the CPUs of a node: its threads keep to them, and a mapped file is not read ahead by
    whichever node has a free CPU. One that uses the CPUs of several: its threads are dealt out to all of them.
    nodes: those whose CPUs it uses.
    """
    if "--numa" not in options:
        return ()
    if is_bound:
        return ("--numa", "numactl")
    return ("--numa", "distribute") if nodes > 1 else ()


def own_placement_arguments(options: frozenset[str]) -> tuple[str, ...]:
    """Return the flags that keep llama-server from changing the placement that it is given."""
    return ("--fit", "off") if "--fit" in options else ()


def host_cache_arguments(options: frozenset[str], prompt_bytes: int | None, checkpoints: int) -> tuple[str, ...]:
    """Return the flags that limit what it keeps of prompts in the host's memory. prompt_bytes: None = its default."""
    if prompt_bytes is None:
        return ()
    prompts = ("--cache-ram", str(prompt_bytes // 2**20)) if "--cache-ram" in options else ()
    states = ("--ctx-checkpoints", str(checkpoints)) if "--ctx-checkpoints" in options else ()
    return (*prompts, *states)
