"""JSON objects over a pipe, each after its length: the protocol between the exporter and its NVML process."""

from __future__ import annotations

import json
import struct
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_LENGTH = struct.Struct("<I")


def write_frame(stream: IO[bytes], content: Mapping[str, Any]) -> None:
    """Send one object at once."""
    body = json.dumps(content, separators=(",", ":")).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> dict[str, Any] | None:
    """Wait for one object; None at the end of the stream, also in the middle of an object."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        return None
    content: dict[str, Any] = json.loads(body)
    return content
