"""The files of a comparison of types of weights: one model in each type, made from one source by llama-quantize."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pascaline.quantize import Options, Tools, quantize

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pascaline.models.spec import ModelSpec

REFERENCE_TYPE = "F16"
PRECISE_BYTES = 2
"""Bytes per weight in the reference that is made."""
_PRECISE = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeFiles:
    """Finds and makes the files."""

    source: Path
    """The user's model, which may be one of the types itself."""
    spec: ModelSpec
    """Its header."""
    name: str
    """Beginning of the name of each file that is made."""
    folder: Path
    """Where they are made."""
    tools: Tools
    on_step: Callable[[str, int, int], None]
    """Called with (what is done, steps done, steps in all) while a file is made."""

    @property
    def source_is_precise(self) -> bool:
        """Whether the source has at least the precision of the reference."""
        return self.spec.file_type in _PRECISE

    @property
    def reference_bytes(self) -> int:
        """Bytes of the reference that is still to be made; 0 if there is one."""
        if self.source_is_precise or self.made(REFERENCE_TYPE).exists():
            return 0
        return PRECISE_BYTES * self.spec.n_parameters

    def made(self, kind: str) -> Path:
        """Return where the model of a type is made."""
        return self.folder / f"{self.name}-{kind}.gguf"

    def in_type(self, kind: str) -> Path:
        """Return the model in a type; make it if it is missing."""
        if kind == self.spec.file_type:
            return self.source
        file = self.made(kind)
        if not file.exists():
            source = self.source if kind == REFERENCE_TYPE else self.precise()
            # The measurement shows whether it works.
            options = Options(tools=self.tools, allow_requantize=True, verify=False)
            quantize(source, kind, file, options=options, on_step=self.on_step)
        return file

    def precise(self) -> Path:
        """Return the file that the others are made from and compared with: the source if precise, otherwise its F16."""
        return self.source if self.source_is_precise else self.in_type(REFERENCE_TYPE)

    def discard(self, kind: str) -> None:
        """Delete a file that was made, with its checksum; keep the reference, from which the others are made."""
        if kind != self.spec.file_type and kind != REFERENCE_TYPE:
            file = self.made(kind)
            file.unlink()
            file.with_name(f"{file.name}.sha256").unlink(missing_ok=True)

    def discard_all(self) -> None:
        """Delete all files that were made."""
        shutil.rmtree(self.folder)


def size_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the size of a file and the number of bits per weight, by each tensor's actual type."""
    by_type: dict[str, int] = {}
    for tensor in spec.tensors:
        by_type[tensor.tensor_type] = by_type.get(tensor.tensor_type, 0) + tensor.n_bytes
    return {
        "file_bytes": spec.file_bytes,
        "weights_bytes": spec.weights_bytes,
        "bits_per_weight": 8 * spec.weights_bytes / spec.n_parameters,
        "tensor_bytes": dict(sorted(by_type.items(), key=lambda item: -item[1])),
    }
