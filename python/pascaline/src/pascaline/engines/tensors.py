"""Tensors of a model as memory models see them: their role by name, and the bytes of a value in each type."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.models.spec import TensorSpec

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of a value in each type of the computation."""
DTYPE_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Type of the computation -> the name that model files have for it."""

_EXPERTS = re.compile(r"_exps\.weight$|\.experts\.")
_EMBEDDING = re.compile(r"^token_embd\.weight$|(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")
_OUTPUT = re.compile(r"^output\.weight$|(^|\.)lm_head\.weight$")


def is_experts(name: str) -> bool:
    """Whether it holds experts of a mixture."""
    return bool(_EXPERTS.search(name))


def is_embedding(name: str) -> bool:
    """Whether it is the input embedding."""
    return bool(_EMBEDDING.search(name))


def is_output(name: str) -> bool:
    """Whether it is the output layer."""
    return bool(_OUTPUT.search(name))


def is_vocabulary(name: str) -> bool:
    """Whether it has a row for each token of the vocabulary."""
    return is_embedding(name) or is_output(name)


def is_matrix(tensor: TensorSpec) -> bool:
    """Whether it is multiplied with: everything but norms and biases."""
    return len(tensor.shape) > 1


def matrix_shape(tensor: TensorSpec) -> tuple[int, int]:
    """Return it as (rows, columns): experts and their rows are one dimension, a vector is one row."""
    columns = tensor.shape[-1] if tensor.shape else 1
    return tensor.n_elements // max(1, columns), columns


def padded(count: int, multiple: int) -> int:
    """Return the count rounded up to a multiple."""
    return -(-count // multiple) * multiple
