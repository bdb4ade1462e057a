"""What the plugin would do on this machine, and why: `sglang-pascal info`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any

from sglang_pascal.compat import shims_for
from sglang_pascal.cpu import recommended_cpu_settings
from sglang_pascal.device import Device, decide, visible_devices
from sglang_pascal.errors import PluginError
from sglang_pascal.versions import SUPPORTED_SGLANG


def collect() -> dict[str, Any]:
    """Return everything that `info` prints, as plain values."""
    import torch

    devices = visible_devices()
    decision = decide(devices, os.environ, torch.version.hip)
    shims = shims_for(decision.device) if decision.device else []
    return {
        "active": decision.device is not None,
        "device": decision.device,
        "reason": decision.reason,
        "devices": [str(device) for device in devices],
        "sglang": _version("sglang"),
        "sglang_supported": list(SUPPORTED_SGLANG),
        "torch": torch.__version__,
        "kernels": describe_kernels(devices if decision.device == "cuda" else []),
        "cpu": recommended_cpu_settings().describe(),
        "shims": [{"name": shim.name, "stage": shim.stage, "what": shim.what, "why": shim.why} for shim in shims],
    }


def describe_kernels(devices: list[Device]) -> str:
    """Return which machine code the first of these devices would run, and whether it exists.

    devices: the devices to serve on; none on a CPU.
    """
    from sglang_pascal.kernels.build import MODULES, check_toolchain, missing
    from sglang_pascal.kernels.driver import target_of

    if not devices:
        return "not used: operations compute in plain torch"
    try:
        architecture, kind = target_of(devices[0].compute_capability)
        left = missing(architecture, kind)
        name = f"machine code for sm_{architecture}" if kind == "cubin" else f"PTX for compute_{architecture}"
        text = f"{name}, {len(MODULES) - len(left)} of {len(MODULES)} modules built"
        if left:
            check_toolchain()
            text += "; the rest when first used"
    except PluginError as exc:
        return f"cannot be used: {exc}"
    return text


def print_info(*, as_json: bool) -> int:
    """Print it; return exit code 0 if SGLang's version is supported."""
    facts = collect()
    sys.stdout.write(json.dumps(facts, indent=2) + "\n" if as_json else _as_text(facts))
    return 0 if facts["sglang"] in SUPPORTED_SGLANG else 8


def _as_text(facts: dict[str, Any]) -> str:
    state = f"active on {facts['device']}" if facts["active"] else "not active"
    cpu = ", ".join(f"{key}={value}" for key, value in facts["cpu"].items())
    lines = [
        f"plugin   {state}: {facts['reason']}",
        f"devices  {', '.join(facts['devices']) or 'none'}",
        f"sglang   {facts['sglang']} (supported: {', '.join(facts['sglang_supported'])})",
        f"torch    {facts['torch']}",
        f"kernels  {facts['kernels']}",
        f"cpu      {cpu}",
        *(f"shim     {shim['name']} ({shim['stage']}): {shim['what']}" for shim in facts["shims"]),
    ]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
