"""llama.cpp's programs: where they are, and how they are run so that none of them outlives this process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.errors import MissingError
from pascaline.programs import ending

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KEPT_LINES = 50
"""Last lines of output that a failure's message may quote."""
INSTALL = "install llama.cpp (Debian: llama.cpp-tools and llama.cpp-tools-extra, Nix: llama-cpp)"

# The newest name of each program first.
_NAMES = {
    "quantize": ("llama-quantize",),
    "imatrix": ("llama-imatrix",),
    "generate": ("llama-completion", "llama-cli"),
    "perplexity": ("llama-perplexity",),
    "convert": ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf"),
}


@dataclass(frozen=True, slots=True)
class Tools:
    """The installed programs."""

    folder: Path | None = None
    """Searched first; None: search only PATH."""
    converter: Path | None = None
    """llama.cpp's convert_hf_to_gguf.py if it is not on PATH."""
    python: Path = Path(sys.executable)
    """Runs the converter; it must have torch, transformers and gguf."""

    def command(self, tool: str) -> list[str]:
        """Return the command of one of the keys of _NAMES. Raises MissingError if it is not installed."""
        if tool == "convert" and self.converter is not None:
            if not self.converter.is_file():
                raise MissingError(f"--converter: {self.converter} is not a file")
            return self._script(self.converter)
        for name in _NAMES[tool]:
            if found := self._find(name):
                return self._script(found) if tool == "convert" else [str(found)]
        where = f"in {self.folder} or on PATH" if self.folder else "on PATH"
        option = "--converter" if tool == "convert" else "--tools"
        raise MissingError(f"{' or '.join(_NAMES[tool])} is not {where}; {INSTALL}, or name it with {option}")

    def _find(self, name: str) -> Path | None:
        if self.folder is not None and (found := shutil.which(name, path=str(self.folder))):
            return Path(found)
        found = shutil.which(name)
        return Path(found) if found else None

    def _script(self, path: Path) -> list[str]:
        # The script's own first line names a Python that usually lacks torch.
        return [str(self.python), str(path)] if path.suffix == ".py" else [str(path)]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    code: int
    """Negative: ended by that signal."""
    last_lines: tuple[str, ...]
    """Last lines of output and errors together."""

    @property
    def reason(self) -> str:
        """Its last line and exit code, for a message."""
        words = next((line for line in reversed(self.last_lines) if line.strip()), "it said nothing")
        return f"{ending(self.code)}: {words.strip()}"


def run(command: Sequence[str], on_line: Callable[[str], None]) -> Ended:
    """Run a program to its end; `on_line` gets each line, ended by a newline or a carriage return.

    However this call ends, the program and everything that it started have ended too. If this process is killed, the
    program ends with it.
    """
    if shutil.which(command[0]) is None:
        raise MissingError(f"failed to run {command[0]}: it is not a program; {INSTALL}")
    process = subprocess.Popen(
        with_parent(*command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:  # universal newlines: a carriage return ends a line too
            last.append(line.rstrip("\n"))
            on_line(last[-1])
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return Ended(code, tuple(last))
