"""Reads traces of torch's profiler (Chrome's format, plain or gzip) as timelines.

On a GPU, kernels are separate events; `External id` links each to the operator that launched it. On a CPU, the
operators themselves are the kernels, each without the time of the operators that it called.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pascaline.errors import PascalineError
from pascaline.profile.timeline import CPU, Kernel, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MICRO = 1e-6
GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
MAX_TRACE_BYTES = 4 << 30
"""Limit of the unpacked size; viewers cannot use a longer record either."""
DTYPE_BYTES = {
    "double": 8,
    "long": 8,
    "long int": 8,
    "int": 4,
    "float": 4,
    "c10::half": 2,
    "c10::bfloat16": 2,
    "short": 2,
    "c10::float8_e5m2": 1,
    "c10::float8_e4m3fn": 1,
    "unsigned char": 1,
    "signed char": 1,
    "char": 1,
    "bool": 1,
}
"""torch's names in `Input type`, in lower case -> bytes per element."""
MATRIX_PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|linear|matmul)$|mkldnn.*linear")
VIEWS = re.compile(
    r"aten::(view|as_strided|slice|transpose|t|expand|unsqueeze|squeeze|select|permute|detach|alias|empty.*)$"
)
"""Operators that only describe memory."""
# SGLang's name for each of its decode steps, such as step[DECODE bs=4].
_STEP = re.compile(r"step\[DECODE\b")


class TraceError(PascalineError):
    """A file is not a trace, or is empty."""


def read_trace(path: Path, steps: int = 0) -> Timeline:
    """Read a trace. steps: number of recorded decode steps, if the trace does not contain it.

    Raises TraceError if the file is cut off, is not a trace, or holds no operator.
    """
    document = _load(path)
    events = _events(path, document)
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    device = [event for event in spans if event.get("cat") in GPU_CATEGORIES]
    operators = [event for event in spans if event.get("cat") == "cpu_op"]
    if not device and not operators:
        raise TraceError(f"{path} holds neither kernels nor operators: nothing ran while it was recorded")
    kernels = _gpu_kernels(device, operators) if device else _cpu_kernels(operators)
    return Timeline(_device_name(document) if device else CPU, _from_zero(kernels), _steps(spans) or steps)


def load_events(path: Path) -> list[dict[str, Any]]:
    """Return a trace's events as they are. Raises TraceError if the file is cut off or is not a trace."""
    return _events(path, _load(path))


def _events(path: Path, document: dict[str, Any]) -> list[dict[str, Any]]:
    events = document.get("traceEvents")
    if not isinstance(events, list):
        raise TraceError(f"{path} is not a trace: it has no traceEvents")
    return events


def _device_name(document: dict[str, Any]) -> str:
    names = (properties.get("name") for properties in document.get("deviceProperties", []))
    return next((str(name) for name in names if name), "GPU")


def _from_zero(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Return the kernels by their start, the first of which is time 0."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    return tuple(replace(kernel, start=kernel.start - ordered[0].start) for kernel in ordered)


def is_whole(path: Path) -> bool:
    """Whether a trace that another process writes is complete."""
    try:
        _load(path)
    except TraceError:
        return False
    return True


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            text = file.read(MAX_TRACE_BYTES)
        document = json.loads(text)
    except OSError as error:
        raise TraceError(f"failed to read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise TraceError(f"{path} is not a trace, or is cut off: {error}") from error
    if not isinstance(document, dict):
        raise TraceError(f"{path} is not a trace: it holds a {type(document).__name__}")
    return document


def _gpu_kernels(events: list[dict[str, Any]], operators: Iterable[dict[str, Any]]) -> list[Kernel]:
    by_id = {event["args"].get("External id"): event for event in operators if "args" in event}
    longest: dict[Any, dict[str, Any]] = {}
    for event in events:
        number = event.get("args", {}).get("External id")
        if number not in longest or event["dur"] > longest[number]["dur"]:
            longest[number] = event
    kernels = []
    for event in events:
        arguments = event.get("args", {})
        number = arguments.get("External id")
        launcher = by_id.get(number)
        moved = _transferred(arguments)
        if moved is None and launcher is not None:
            # What an operator reads counts once, with the longest of its kernels.
            moved = _bytes(launcher) if longest[number] is event else 0
        operator = str(launcher["name"]) if launcher else ""
        kernels.append(_kernel(event, event["dur"], moved, int(arguments.get("stream") or 0), operator))
    return kernels


def _transferred(arguments: dict[str, Any]) -> int | None:
    """Return the bytes of a copy, by the driver's report."""
    size = arguments.get("bytes")
    return size if isinstance(size, int) else None


def _cpu_kernels(operators: list[dict[str, Any]]) -> list[Kernel]:
    """Operators with their own time: a parent's time minus its children's, per thread."""
    kernels = []
    for thread in {(event.get("pid"), event.get("tid")) for event in operators}:
        own = [event for event in operators if (event.get("pid"), event.get("tid")) == thread]
        stack: list[tuple[dict[str, Any], float]] = []
        for event in sorted(own, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                kernels.append(_closed(*stack.pop()))
            if stack:
                parent, children = stack[-1]
                stack[-1] = (parent, children + event["dur"])
            stack.append((event, 0.0))
        kernels += [_closed(*entry) for entry in stack]
    return [kernel for kernel in kernels if kernel.seconds > 0]


def _closed(event: dict[str, Any], children: float) -> Kernel:
    # An operator that mostly calls others moves no bytes itself.
    own = max(0.0, event["dur"] - children)
    return _kernel(event, own, _bytes(event) if own > children else None, 0)


def _kernel(event: dict[str, Any], microseconds: float, moved: int | None, stream: int, operator: str = "") -> Kernel:
    return Kernel(str(event["name"]), event["ts"] * MICRO, microseconds * MICRO, moved, stream, operator)


def _bytes(event: dict[str, Any]) -> int | None:
    """Return the bytes of an operator's inputs and, for a matrix product, its result; None without recorded shapes."""
    name, sizes = str(event.get("name")), _input_sizes(event.get("args", {}))
    if not sizes or VIEWS.match(name):
        return None
    total = sum(math.prod(shape) * width for shape, width in sizes)
    matrices = [(shape, width) for shape, width in sizes if len(shape) >= 2]
    if MATRIX_PRODUCTS.match(name) and len(matrices) >= 2:
        (left, width), (right, _) = matrices[-2:]
        return total + math.prod(left[:-1]) * right[-1] * width
    # An element-wise operator writes as many bytes as its largest input has.
    return total + max(math.prod(shape) * width for shape, width in sizes)


def _input_sizes(arguments: dict[str, Any]) -> list[tuple[list[int], int]]:
    """Return (shape, bytes of an element) of each tensor among an operator's inputs; empty without recorded shapes."""
    shapes, types = arguments.get("Input Dims"), arguments.get("Input type")
    if not isinstance(shapes, list) or not isinstance(types, list):
        return []
    widths = [DTYPE_BYTES.get(kind.lower()) if isinstance(kind, str) else None for kind in types]
    return [
        (shape, width)
        for shape, width in zip(shapes, widths, strict=False)
        if width is not None and shape and all(isinstance(n, int) for n in shape)
    ]


def _steps(spans: Iterable[dict[str, Any]]) -> int:
    """Return the number of decode steps that SGLang marked; 0 if none."""
    marks = [e for e in spans if e.get("cat") == "user_annotation" and _STEP.search(str(e.get("name")))]
    return len(marks)
