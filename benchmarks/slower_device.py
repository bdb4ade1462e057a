"""An SGLang plugin for benchmarks that makes each step's device time longer: the host and the text stay real.

A draft model's passes are as fast as they are.

`installed(folder, milliseconds, row_milliseconds)` writes what SGLang needs to find it and returns the environment. A
GPU waits inside its own queue, so that the host runs ahead as it does beside a slower card; a CPU just sleeps. All
servers wait the same number of cycles: one that measured its own clock would differ from its neighbour by percents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEP: Final = "SLOWER_DEVICE_STEP_MS"
ROW: Final = "SLOWER_DEVICE_ROW_MS"
CYCLES: Final = "SLOWER_DEVICE_CYCLES_PER_SECOND"
_TARGET: Final = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"
_MOST_ROWS: Final = 64
"""A prompt's rows beyond these cost nothing more."""
_CALIBRATION_CYCLES: Final = 20_000_000


def installed(folder: Path, milliseconds: float, row_milliseconds: float, device: str) -> dict[str, str]:
    """Return the environment in which SGLang finds this plugin.

    folder: an empty one. milliseconds, row_milliseconds: of a step, and of each row beyond the first. device: "cpu" or
    "cuda", whose clock is then measured by a process of its own.
    """
    shutil.copy(__file__, folder)
    described = folder / "slower_device-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: slower-device\nVersion: 0\n")
    (described / "entry_points.txt").write_text("[sglang.srt.plugins]\nslower_device = slower_device:register\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    found = {"PYTHONPATH": path, STEP: str(milliseconds), ROW: str(row_milliseconds)}
    if device == "cuda":
        measured = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
        found[CYCLES] = measured.stdout.strip()
    return found


def register() -> None:
    """Wait before each pass of the model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, _slower, HookType.AROUND)


def _slower(original: Callable[..., Any], worker: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    if worker.is_draft_worker:
        return original(worker, batch, *arguments, **options)
    rows = min(_MOST_ROWS, len(batch.input_ids) if batch.input_ids is not None else 1)
    seconds = (float(os.environ[STEP]) + float(os.environ[ROW]) * (rows - 1)) / 1000
    if worker.model_runner.device == "cuda":
        import torch

        torch.cuda._sleep(int(seconds * float(os.environ[CYCLES])))
    else:
        time.sleep(seconds)
    return original(worker, batch, *arguments, **options)


def cycles_per_second() -> float:
    """Measure the clock of the GPU while it is busy."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CALIBRATION_CYCLES)  # the clock rises
    begin.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return _CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1000)


if __name__ == "__main__":
    print(cycles_per_second())
