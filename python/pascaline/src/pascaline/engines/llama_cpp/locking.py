"""The limit of locked memory: where the kernel refuses, llama-server only warns, and its memory may then swap."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from pascaline.errors import ConfigurationError
from pascaline.units import format_bytes

STATUS = Path("/proc/self/status")
CAP_IPC_LOCK = 14
"""Number of the capability that has no such limit (capability.h)."""


def check_limit(n_bytes: int, limit: int | None = None, status: Path = STATUS) -> None:
    """Raise ConfigurationError if the limit forbids locking n_bytes. limit: None means this process's limit."""
    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if allowed == resource.RLIM_INFINITY or n_bytes <= allowed or _is_exempt(status):
        return
    raise ConfigurationError(
        f"placement.weights: locked needs {format_bytes(n_bytes)} of locked memory, the limit is "
        f"{format_bytes(allowed)}; raise it (systemd: LimitMEMLOCK=infinity, a shell: ulimit -l unlimited), or set "
        "placement.weights to pinned or mapped"
    )


def _is_exempt(status: Path) -> bool:
    try:
        match = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(match and int(match[1], 16) >> CAP_IPC_LOCK & 1)
