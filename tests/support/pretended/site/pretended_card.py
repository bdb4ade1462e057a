"""In a process that sees a pretended card: what a Pascal card cannot run is an error that names its caller.

It is loaded into every Python process of a test, so it imports little and changes a module only when that is imported.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

VARIABLE, PARENT, REPORT = (
    "SGLANG_PASCAL_PRETENDED_CARD",
    "STAND_IN_CARD_PARENT",
    "STAND_IN_CARD_REPORT",
)
_FRAMES = 12
"""Callers that a message names: the innermost."""


class PretendedCardError(RuntimeError):
    """A Pascal card could not run this."""


def install() -> None:
    """Watch for the modules below, if a test asks for it; end the process if anybody else does."""
    card = os.environ.get(VARIABLE)
    if card is None:
        return
    if not _is_below(os.environ.get(PARENT, "")):
        sys.stderr.write(
            f"{VARIABLE}={card} is for this project's tests, under `python tests/support/pretended`: unset it\n"
        )
        sys.stderr.flush()
        os._exit(2)
    sys.meta_path.insert(0, _AfterImport())


def _is_below(parent: str) -> bool:
    """Whether a process id is this process' or that of one above it."""
    pid = os.getpid()
    while pid > 0:
        if str(pid) == parent:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def callers() -> list[str]:
    """Return the innermost callers as `file:line function`, without this module."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-_FRAMES:])]


def refused(what: str) -> str:
    """Write what was asked for and by whom to standard error and to the report; return the message."""
    who = callers()
    message = f"{os.environ.get('STAND_IN_CARD_NAME')} cannot run {what}, called by {' < '.join(who) or 'no Python'}"
    sys.stderr.write(f"pretended card: {message}\n")
    if report := os.environ.get(REPORT):
        with Path(report).open("a") as file:
            file.write(json.dumps({"what": what, "callers": who, "command": sys.argv}) + "\n")
    return message


def refuse(what: str) -> None:
    """Raise what `refused` says."""
    raise PretendedCardError(refused(what))


def _change_torch(torch: Any) -> None:
    """torch.compile is an error where its result is called; torch has code for the card.

    Its attention for Pascal has no machine code for the real card, where it would leave the result as it was: off.
    """
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    flags = torch._C._cuda_getArchFlags
    major, minor = os.environ["STAND_IN_CARD_MAJOR"], os.environ["STAND_IN_CARD_MINOR"]
    torch._C._cuda_getArchFlags = lambda: f"{flags() or ''} sm_{major}{minor}".strip()
    torch.compile = compile_nothing


def compile_nothing(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand for torch.compile: the function itself if dynamo is off, as torch does, else one that may not be called."""
    if model is None:
        return functools.partial(compile_nothing, **options)
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or options.get("disable"):
        return model

    @functools.wraps(model)
    def called(*_arguments: Any, **_named: Any) -> None:
        refuse(f"{getattr(model, '__qualname__', model)} compiled by torch.compile")

    return called


def _change_inductor(module: Any) -> None:
    """Whoever reaches the compiler without torch.compile is refused too."""
    module.compile_fx = lambda *_arguments, **_named: refuse("a graph compiled by inductor")


def _change_triton(module: Any) -> None:
    def run(kernel: Any, *_arguments: Any, **_named: Any) -> None:
        refuse(f"the Triton kernel {getattr(kernel, '__name__', kernel)}")

    module.JITFunction.run = run


def _change_kernels(module: Any) -> None:
    """Our kernels come as PTX: their machine code for Pascal does not run on the real card."""
    target_of = module.target_of
    module.target_of = lambda capability: (target_of(capability)[0], "ptx")


CHANGES: dict[str, Callable[[Any], None]] = {
    "torch": _change_torch,
    "torch._inductor.compile_fx": _change_inductor,
    "triton.runtime.jit": _change_triton,
    "sglang_pascal.kernels.driver": _change_kernels,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module of CHANGES as the others do, and changes it once it is executed."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of another finder with a loader that changes the module."""
        del path, target
        if name not in CHANGES or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), CHANGES[name](module))[0]  # type: ignore[method-assign]
        return spec
