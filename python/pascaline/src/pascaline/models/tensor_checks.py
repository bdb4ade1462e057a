"""Checks of the tensors that one file lists, the same for GGUF and safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pascaline.models.refusal import refuse, shown

if TYPE_CHECKING:
    from pascaline.models.spec import TensorSpec


def check_unique_names(file: str, tensors: tuple[TensorSpec, ...]) -> None:
    """Refuse two tensors of one name."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            refuse(file, f"two tensors are named {shown(tensor.name)}")
        seen.add(tensor.name)


def check_extents(file: str, size: int, tensors: tuple[TensorSpec, ...]) -> None:
    """Refuse tensors of one file that share bytes or reach beyond its end. size: bytes of the file."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            refuse(file, f"tensors {shown(before)} and {shown(tensor.name)} overlap")
        end, before = tensor.data_offset + tensor.n_bytes, tensor.name
    if end > size:
        first = min((t for t in tensors if t.data_offset + t.n_bytes > size), key=lambda tensor: tensor.data_offset)
        refuse(
            file,
            f"it is truncated: {end - size} bytes are missing, from tensor {shown(first.name)} on; download it again",
        )
