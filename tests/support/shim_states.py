"""Start SGLang's modules as a worker does and print, as JSON, what became of each shim: `shim_states.py cpu|cuda`.

Run in the engine's Python. cuda is a Tesla P4 that only torch's answers simulate; nothing is computed on it. A shim
that fails does not keep the others from being applied.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def main() -> None:
    """Print one line of JSON as the last line."""
    device = sys.argv[1]
    with contextlib.redirect_stdout(sys.stderr):
        errors = collect_errors()
        if device == "cuda":
            simulate_p4()
        start_error = ""
        try:
            start()
        except BaseException as exc:
            start_error = f"{type(exc).__name__}: {exc}".splitlines()[0]
        from sglang_pascal.compat import shims_for

        shims = [describe(shim, errors) for shim in shims_for(device)]
    print(json.dumps({"start_error": start_error, "shims": shims}))


def collect_errors() -> dict[str, str]:
    """Make `apply_shims` go on after a shim that fails; return its errors, by name, as they come."""
    from sglang_pascal import compat

    errors: dict[str, str] = {}

    def apply_all(device: str, stage: str) -> None:
        for shim in compat.shims_for(device, stage):
            try:
                if shim.is_needed() and not shim.is_applied():
                    shim.apply()
            except Exception as exc:
                errors[shim.name] = f"{type(exc).__name__}: {exc}"

    compat.apply_shims = apply_all
    return errors


def simulate_p4() -> None:
    """Let torch and the plugin see one Tesla P4."""
    import sglang_pascal.device as device
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (6, 1)
    torch.cuda.get_device_name = lambda device=None: "Tesla P4"
    torch.cuda.device_count = lambda: 1
    device.devices = lambda: (device.Device(0, "Tesla P4", (6, 1)),)


def start() -> None:
    """Import what a server and a worker import, and let the platform prepare a worker."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.model_executor.model_runner
    import sglang.srt.server_args  # noqa: F401


def describe(shim: Any, errors: dict[str, str]) -> dict[str, Any]:
    """Ask one shim."""
    found: dict[str, Any] = {"name": shim.name, "needed": True, "applied": False, "error": errors.get(shim.name, "")}
    try:
        found |= {"needed": bool(shim.is_needed()), "applied": bool(shim.is_applied())}
    except Exception as exc:
        found["error"] = found["error"] or f"{type(exc).__name__}: {exc}"
    return found


if __name__ == "__main__":
    main()
