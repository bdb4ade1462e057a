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

    from sglang_pascal.device import decide, devices, refuse_pretended_card

    refuse_pretended_card(os.environ)
    return decide(list(devices()), os.environ, torch.version.hip)


def _check_torch() -> None:
    """Refuse a torch without code for a visible card now: it would fail in the middle of loading a model."""
    import torch

    from sglang_pascal.card_code import check_torch
    from sglang_pascal.device import devices
    from sglang_pascal.orphans import in_a_fork

    # visible_devices and get_arch_list would initialise CUDA; asked for its flags, torch refuses CUDA in later forks.
    built_for = in_a_fork(lambda: torch._C._cuda_getArchFlags() or "").split() if torch.version.cuda else []
    check_torch(torch.__version__, built_for, {device.compute_capability for device in devices()})


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: return the platform class to use, or None to change nothing.

    Runs in every process while SGLang's first module is imported.
    """
    from sglang_pascal.collector import collect_seldom
    from sglang_pascal.compat import apply_shims, check_sglang_version
    from sglang_pascal.orphans import die_with_parent

    device = _decision().device
    if device is None:
        return None
    check_sglang_version()
    collect_seldom()
    if device == "cuda":
        _check_torch()
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
