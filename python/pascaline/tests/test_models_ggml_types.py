"""Our tables of GGML's types are those of the gguf package, which the product itself does not import."""

from __future__ import annotations

import subprocess
import sys

import gguf
from pascaline.models.ggml_types import FILE_TYPES, GUESSED_FILE_TYPE, REMOVED_TENSOR_TYPES, TENSOR_TYPES


def test_tensor_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: tuple(kind) for number, kind in TENSOR_TYPES.items()} == theirs
    assert {int(kind) for kind in gguf.GGMLQuantizationType} == TENSOR_TYPES.keys()


def test_removed_types_are_not_in_the_gguf_package() -> None:
    assert not REMOVED_TENSOR_TYPES.keys() & TENSOR_TYPES.keys()


def test_file_types_are_those_of_the_gguf_package() -> None:
    theirs = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in gguf.LlamaFileType}
    assert theirs.pop(GUESSED_FILE_TYPE) == "GUESSED"
    assert theirs == FILE_TYPES


def test_reading_a_model_imports_no_numpy_and_no_http_client() -> None:
    code = "import sys, pascaline.models.reader; print(sorted({'numpy', 'gguf', 'httpx', 'torch'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout == "[]\n"
