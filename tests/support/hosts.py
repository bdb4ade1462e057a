"""Recorded hosts for the doctor: a folder of files, outputs, answers and an NVML scenario in place of a machine.

hosts/healthy   root/ (files), commands/ (outputs by name), http/HOST:PORT/PATH (answers), host.nvml, read_speed
broken_hosts.toml   what each broken host changes in the healthy one, and the findings that must follow
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pascaline.doctor.machine import Machine
from pascaline.gpu.fake_nvml import fake_nvml_environment
from pascaline.gpu.reader import Reader
from pascaline.gpu.reading import Reading
from pascaline.programs import Output
from support.models import tiny, write_gguf

HEALTHY = Path(__file__).parent.parent / "doctor" / "hosts" / "healthy"
RECORDED_AT = 1_795_262_400.0
"""2026-11-21: what these hosts take for now."""
DEADLINE_SECONDS = 6.0


@dataclass
class RecordedMachine(Machine):
    """Answers as a machine did that was recorded."""

    folder: Path = Path()

    @property
    def now(self) -> float:
        recorded = self.folder / "now"
        return float(recorded.read_text()) if recorded.exists() else RECORDED_AT

    def run(
        self, name: str, command: Sequence[str], *, text: str = "", timeout: float = DEADLINE_SECONDS
    ) -> Output | None:
        """A missing file means that the program is not installed; a first line `exit N` makes it fail."""
        recorded = self.folder / "commands" / name
        if not recorded.exists():
            return None
        output = recorded.read_text()
        self.transcript.append((f"{name}: {' '.join(command)}", output))
        code, _, rest = output.partition("\n")
        return Output(int(code.removeprefix("exit ")), "", rest) if code.startswith("exit ") else Output(0, output)

    def fetch(self, url: str) -> str | None:
        recorded = self.folder / "http" / url.removeprefix("http://")
        return recorded.read_text() if recorded.is_file() else None

    def reading(self) -> Reading:
        environment = fake_nvml_environment(self.folder / "host.nvml")
        with Reader(environment=environment, deadline=DEADLINE_SECONDS, start_deadline=DEADLINE_SECONDS) as reader:
            reading = reader.read()
        self.transcript.append(("nvml", repr(reading)))
        return reading

    def read_speed(self, path: Path) -> float | None:
        return float((self.folder / "read_speed").read_text())


def recorded_host(folder: Path, changes: Mapping[str, Any] | None = None) -> RecordedMachine:
    """Make a host in an empty folder: the healthy one with these changes, and a real model file in it.

    changes: `files` (path -> whole content), `edits` (path -> {old text: new text}), `removed` (paths),
    `nvml` (lines behind the scenario), `variables` (of the doctor's own process).
    """
    changes = changes or {}
    shutil.copytree(HEALTHY, folder, symlinks=True, dirs_exist_ok=True)
    model = folder / "root/models/emily.Q4_K_M.gguf"
    model.parent.mkdir()
    _write_model(model, **changes.get("model", {}))
    for path, content in changes.get("files", {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    for path, edits in changes.get("edits", {}).items():
        for old, new in edits.items():
            _edit(folder / path, old, new)
    for path in changes.get("removed", ()):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
    _append(folder / "host.nvml", changes.get("nvml", ""))
    _insert_checksum(folder / "root/etc/pascaline/emily.toml", model)
    return RecordedMachine(root=folder / "root", environment=changes.get("variables", {}), folder=folder)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} does not hold {old!r}"
    path.write_text(text.replace(old, new))


def _append(path: Path, lines: str) -> None:
    with path.open("a") as file:
        file.write(f"\n[gpu 0]\n{lines}\n" if lines and not lines.startswith("[") else lines)


def _insert_checksum(settings: Path, model: Path) -> None:
    if settings.exists() and model.exists():
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        settings.write_text(settings.read_text().replace("@SHA256@", digest))


def _write_model(path: Path, architecture: str = "llama", mixture: str = "Q4_K_M", without: Sequence[str] = ()) -> None:
    write_gguf(path, tiny("llama", context_length=8192), mixture)
    data = path.read_bytes()
    # Replaced by texts of the same length: a header has no room, and every key is in it but once.
    for key in without:
        data = data.replace(key.encode(), key[:-1].encode() + b"_", 1)
    if architecture != "llama":
        data = data.replace(b"llama", architecture[:5].encode())
    path.write_bytes(data)
