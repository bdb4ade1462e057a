"""Whether SGLang can serve a GGUF model as its file says. It takes the header and returns reasons, without I/O.

header      the header as plain data, and the result of the checks
keys        every metadata key: used, known to be harmless, or a reason to refuse
dimensions  sizes of the model, and the tensors that they imply
rope        the scaling of positions, in every spelling
vocabulary  what each kind of tokenizer needs
parts       whether the parts of a split model are of one quantisation
checksum    one checksum for a model of several files
"""

from __future__ import annotations

from .checksum import combined_sha256, file_sha256
from .dimensions import check_tensors, read_dimensions
from .header import Header, Tensor, Unread, Verdict
from .keys import ARCHITECTURES, check_keys
from .parts import foreign_part
from .rope import check_rope
from .vocabulary import check_vocabulary

__all__ = [
    "ARCHITECTURES",
    "Header",
    "Tensor",
    "Unread",
    "Verdict",
    "accept",
    "combined_sha256",
    "file_sha256",
    "foreign_part",
]


def accept(header: Header) -> Verdict:
    """Judge a whole model by its header. Never raises, for any header."""
    verdict = Verdict()
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        verdict.refuse(f"general.architecture is {name!r}, must be one of: {', '.join(ARCHITECTURES)}")
        return verdict
    if not header.tensors:
        verdict.refuse("it has no tensors: it holds a vocabulary or other settings, and no weights")
        return verdict
    check_keys(header, name, verdict)
    dimensions = read_dimensions(header, name, verdict)
    if dimensions is not None:
        check_tensors(header, name, dimensions, verdict)
    check_rope(header, name, verdict)
    check_vocabulary(header, verdict)
    return verdict
