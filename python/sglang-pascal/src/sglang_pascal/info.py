"""What the plugin would do on this machine, or with another card in it, and why: `sglang-pascal info`."""

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


def collect(card: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return everything that `info` prints, as plain values. card: compute capability of a card to suppose instead."""
    import torch

    devices = visible_devices() if card is None else [Device(0, "--card", card)]
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
        "cards": describe_cards(devices if decision.device == "cuda" else []),
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


def describe_cards(devices: list[Device]) -> list[dict[str, Any]]:
    """Return for each kind of card which code the installed libraries hold for it, and what will run on it.

    devices: the devices to serve on; none on a CPU.
    """
    from sglang_pascal.card_code import describe_card

    described = []
    for capability in dict.fromkeys(device.compute_capability for device in devices):
        try:
            described.append(describe_card(capability))
        except PluginError as exc:
            described.append({"compute_capability": ".".join(map(str, capability)), "error": str(exc)})
    return described


def print_info(*, as_json: bool, card: tuple[int, int] | None = None) -> int:
    """Print it; return exit code 0 if SGLang's version is supported, and torch has code for every card."""
    facts = collect(card)
    sys.stdout.write(json.dumps(facts, indent=2) + "\n" if as_json else _as_text(facts))
    libraries = [each for described in facts["cards"] for each in described.get("libraries", ())]
    has_code = all(each["runs"] or each["compiles"] for each in libraries if each["name"] == "torch")
    return 0 if facts["sglang"] in SUPPORTED_SGLANG and has_code else 8


def _as_text(facts: dict[str, Any]) -> str:
    state = f"active on {facts['device']}" if facts["active"] else "not active"
    cpu = ", ".join(f"{key}={value}" for key, value in facts["cpu"].items())
    lines = [
        f"plugin    {state}: {facts['reason']}",
        f"devices   {', '.join(facts['devices']) or 'none'}",
        f"sglang    {facts['sglang']} (supported: {', '.join(facts['sglang_supported'])})",
        f"torch     {facts['torch']}",
        f"kernels   {facts['kernels']}",
        *(line for described in facts["cards"] for line in _card_lines(described)),
        f"cpu       {cpu}",
        *(f"shim      {shim['name']} ({shim['stage']}): {shim['what']}" for shim in facts["shims"]),
    ]
    return "\n".join(lines) + "\n"


def _card_lines(described: dict[str, Any]) -> list[str]:
    card = f"card      compute capability {described['compute_capability']}"
    if "error" in described:
        return [f"{card}: {described['error']}"]
    return [
        card,
        *(f"code      {sentence}" for sentence in described["code"]),
        f"at start  compiles {'; '.join(described['compiled_at_start']) or 'nothing'}",
        *(f"{part:9} {described[part]}" for part in ("attention", "products", "widths")),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
