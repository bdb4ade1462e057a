"""Copies a GGUF model with other types for its matrices, in turn, as input for measurements of numerics.

    python benchmarks/requantize.py MODEL.gguf OUT.gguf TYPE [TYPE ...]

Types are those that the gguf package can make: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32. Several types make a file
in which every layer mixes types. From a quantised model, the copy shows nothing about the quality of the types: its
weights are rounded twice.
"""

from __future__ import annotations

import argparse
import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
_OWN = ("GGUF.", "general.architecture")
"""Prefixes of the keys that the writer adds itself."""


def requantize(source: Path, target: Path, types: Sequence[str]) -> None:
    """types: names in TYPES; the matrices get them in turn, again and again."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(_OWN):
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    kinds = cycle(GGMLQuantizationType[name] for name in types)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        kind = next(kinds)
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Write the copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf", type=Path)
    parser.add_argument("target", metavar="OUT.gguf", type=Path)
    parser.add_argument("types", metavar="TYPE", nargs="+", choices=TYPES)
    args = parser.parse_args()
    if not args.model.is_file():
        parser.error(f"there is no file {args.model}")
    requantize(args.model, args.target, args.types)
    return 0


if __name__ == "__main__":
    sys.exit(main())
