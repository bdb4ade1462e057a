"""Model headers built byte by byte, so that tests can make any field of them wrong, and read from memory."""

from __future__ import annotations

import json
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from pascaline.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

VALUE_TYPES = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "array": (9, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}


def string(text: str | bytes) -> bytes:
    """A GGUF string: its length and its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: str, content: object) -> bytes:
    """A GGUF value with its type in front."""
    return struct.pack("<I", VALUE_TYPES[kind][0]) + payload(kind, content)


def payload(kind: str, content: object) -> bytes:
    """A GGUF value without its type; an array's content is (element type, elements)."""
    if kind == "string":
        return string(content)  # type: ignore[arg-type]  # the kind says what the content is
    if kind != "array":
        return struct.pack("<" + VALUE_TYPES[kind][1], content)
    element_type, elements = content  # type: ignore[misc]  # an array's content is a pair
    head = struct.pack("<IQ", VALUE_TYPES[element_type][0], len(elements))
    return head + b"".join(payload(element_type, element) for element in elements)


def tensor(name: str | bytes, dimensions: Sequence[int], type_number: int, offset: int) -> bytes:
    """A GGUF tensor entry; dimensions in GGUF's order, innermost first."""
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + shape + struct.pack("<IQ", type_number, offset)


# What a model must say of itself, with the smallest numbers that make sense.
LLAMA = {
    "general.architecture": value("string", "llama"),
    "llama.block_count": value("uint32", 2),
    "llama.context_length": value("uint32", 64),
    "llama.embedding_length": value("uint32", 8),
    "llama.feed_forward_length": value("uint32", 16),
    "llama.attention.head_count": value("uint32", 4),
    "llama.attention.head_count_kv": value("uint32", 2),
}


def gguf_file(
    metadata: Mapping[str, bytes] = LLAMA,
    tensors: Sequence[bytes] = (),
    *,
    data_bytes: int = 0,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_count: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file; counts may be other than the truth."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(metadata) if key_count is None else key_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(key) + content for key, content in metadata.items()) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(data_bytes)


def safetensors_file(header: object, *, data_bytes: int = 0, length: int | None = None) -> bytes:
    """A safetensors file; the length of the header may be other than the truth."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + bytes(data_bytes)


def folder_tensors(model_type: str = "llama", missing: Sequence[str] = ()) -> tuple[dict[str, object], int]:
    """The header of all tensors of CONFIG's model, tied, with this model_type, and the bytes that they take."""
    layer = {f"self_attn.{name}_proj.weight": (rows, 8) for name, rows in zip("qkvo", (8, 4, 4, 8), strict=True)}
    layer |= {
        "mlp.gate_proj.weight": (16, 8),
        "mlp.up_proj.weight": (16, 8),
        "mlp.down_proj.weight": (8, 16),
    }
    layer |= {"input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,)}
    layer |= {
        "qwen2": {f"self_attn.{name}_proj.bias": (rows,) for name, rows in zip("qkv", (8, 4, 4), strict=True)},
        "qwen3": {"self_attn.q_norm.weight": (2,), "self_attn.k_norm.weight": (2,)},
    }.get(model_type, {})
    shapes = {"embed_tokens.weight": (16, 8), "norm.weight": (8,)}
    shapes |= {f"layers.{number}.{name}": shape for number in (0, 1) for name, shape in layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        if f"model.{name}" not in missing:
            begin, end = end, end + 2 * prod(shape)
            header[f"model.{name}"] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
    return dict(header), end


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}
"""The config.json of a small llama."""


@dataclass
class MemorySource:
    """A file in memory, which may be longer than its data: the rest reads as zeros, like a sparse file's."""

    name: str
    data: bytes
    size: int
    chunk_bytes: int = 1 << 16

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`."""
        assert 0 <= offset <= offset + size <= self.size, "a read beyond the file"
        return self.data[offset : offset + size].ljust(size, b"\0")


class MemoryFolder:
    """Files in memory, opened by name; those that hold tensors go on with `tail_bytes` of zeros."""

    def __init__(self, files: Mapping[str, bytes], tail_bytes: int = 0) -> None:
        self._files = files
        self._tail_bytes = tail_bytes

    @contextmanager
    def open(self, name: str) -> Iterator[MemorySource]:
        """Open one file. Raises ModelError if no file has this name."""
        if name not in self._files:
            raise ModelError(f"failed to read {name}: no such file or directory")
        data = self._files[name]
        yield MemorySource(name, data, len(data) + (0 if name.endswith(".json") else self._tail_bytes))
