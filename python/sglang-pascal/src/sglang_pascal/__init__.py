"""sglang-pascal: upstream SGLang on NVIDIA Pascal GPUs (compute capability 6.x), and on CPUs for tests.

SGLang finds two entry points here: `activate` chooses the platform class, `register` adds everything that has a name on
the command line. Importing this package is cheap: torch and SGLang are imported inside functions.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_pascal.device import Decision

__all__ = ["activate", "register"]

_PLATFORM_CLASSES = {
    "cpu": "sglang_pascal.platform:PascalCpuPlatform",
    "cuda": "sglang_pascal.platform:PascalCudaPlatform",
}


@functools.cache
def _decision() -> Decision:
    """Return the decision, which stays the same for the life of a process."""
    import torch

    from sglang_pascal.device import decide, visible_devices

    return decide(visible_devices(), os.environ, torch.version.hip)


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: return the platform class to use, or None to change nothing.

    Runs in every process while SGLang's first module is imported.
    """
    from sglang_pascal.compat import apply_shims, check_sglang_version
    from sglang_pascal.orphans import die_with_parent

    device = _decision().device
    if device is None:
        return None
    check_sglang_version()
    die_with_parent()
    apply_shims(device, "activate")
    return _PLATFORM_CLASSES[device]


def register() -> None:
    """Entry point of `sglang.srt.plugins`: adds names and hooks; does nothing if the platform is not active."""
    from sglang_pascal.compat import apply_shims, check_sglang_version

    device = _decision().device
    if device is None:
        return
    check_sglang_version()
    apply_shims(device, "register")
