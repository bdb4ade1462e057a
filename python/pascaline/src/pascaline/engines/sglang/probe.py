"""Runs in the engine's Python. `probe.py VARIABLE…` prints as JSON what is installed and what it was built for.

This file does not import this package, because that Python may not have it. Every answer is optional: what fails is
left out, and `error` says what failed first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGES = ("torch", "sglang", "sglang-pascal", "transformers", "bitsandbytes")


def main() -> None:
    """Print every known fact."""
    # The answer must not contain what imports print.
    with contextlib.redirect_stdout(sys.stderr):
        answer: dict[str, Any] = {"versions": dict(_versions()), "entry_points": _entry_points()}
        for part in (_torch, _plugin, _kernels, _libraries, _runs):
            try:
                answer |= part()
            except Exception as error:
                answer.setdefault("error", f"{type(error).__name__}: {error}")
        answer["unknown_variables"] = _unknown(sys.argv[1:])
    sys.stdout.write(json.dumps(answer))


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _entry_points() -> list[str]:
    return sorted(point.name for point in importlib.metadata.entry_points(group="sglang.srt.platforms"))


def _torch() -> dict[str, Any]:
    # These are facts of the build; the driver is not called.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else ""
    return {"torch_cuda": torch.version.cuda or "", "torch_architectures": (flags or "").split()}


def _plugin() -> dict[str, Any]:
    from sglang_pascal.versions import SUPPORTED_SGLANG

    return {"supported_sglang": list(SUPPORTED_SGLANG)}


def _kernels() -> dict[str, Any]:
    from sglang_pascal.kernels.build import PREBUILT, PREBUILT_VARIABLE
    from sglang_pascal.kernels.formats import FORMATS

    folders = [PREBUILT, Path(os.environ.get(PREBUILT_VARIABLE, PREBUILT))]
    names = {file.name for folder in folders if folder.is_dir() for file in folder.iterdir()}
    found = {match[1] for name in names if (match := re.search(r"\.((?:sm|compute)_\d+)\.(?:cubin|ptx)$", name))}
    return {"kernel_architectures": sorted(found), "kernel_formats": sorted(FORMATS)}


def _libraries() -> dict[str, Any]:
    from sglang_pascal.card_code import installed_code

    return {"library_code": installed_code()}


def _runs() -> dict[str, Any]:
    from sglang_pascal.card_code import what_runs
    from sglang_pascal.kernels.build import ARCHITECTURES

    return {"runs": {f"{major}.{minor}": what_runs((int(major), int(minor))) for major, minor in ARCHITECTURES}}


def _unknown(variables: Sequence[str]) -> list[str]:
    """Return the variables that neither SGLang nor the plugin mentions in any file."""
    unknown = set(variables)
    for package in ("sglang", "sglang_pascal"):
        spec = importlib.util.find_spec(package) if unknown else None
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in Path(folder).rglob("*.py"):
                if not unknown:
                    break
                text = file.read_text(errors="replace")
                unknown -= {name for name in unknown if name in text}
    return sorted(unknown)


if __name__ == "__main__":
    main()
