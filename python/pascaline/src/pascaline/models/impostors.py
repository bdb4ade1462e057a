"""Recognises by its first bytes a file that is not the model: a git-lfs pointer, a web page, a server's text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pascaline.models.source import Source

HEAD_BYTES = 64
"""As many bytes from the start as `impostor` wants, or all of a shorter file."""
POINTER = b"version https://git-lfs"
"""How a git-lfs pointer begins (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--")
_LEAST_TEXT = 8
"""Shortest text that is recognised as such; a shorter one may be a truncated file (safetensors begin with 8 bytes)."""
_AGAIN = "download it again; if the server asks for a login, with a token (pascaline models add --token-file FILE)"


def impostor(head: bytes) -> str | None:
    """Say what a file with these first bytes is if it holds no weights; None if they do not show it."""
    if head.startswith(POINTER):
        return "it is the pointer of a git-lfs file: run git lfs pull"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        return f"it is a web page, which a server sent in place of the file: {_AGAIN}"
    if len(text) >= _LEAST_TEXT and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return (
            f"it is the text {text[:40].decode('ascii')!r}, which a server may have sent in place of the file: {_AGAIN}"
        )
    return None


def text_impostor(head: bytes, *, is_json: bool) -> str | None:
    """Say what stands in place of a tokenizer or a configuration; None if the first bytes show nothing.

    is_json: the file must begin with an object or a list; any other text is an impostor.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return f"it is empty: {_AGAIN}"
    if text.startswith(POINTER) or text.lower().startswith(_PAGES) or (is_json and not text.startswith((b"{", b"["))):
        return impostor(head) or f"it is not JSON: {_AGAIN}"
    return None


def head_of(source: Source) -> bytes:
    """Return the first bytes of a file."""
    return source.read_at(0, min(HEAD_BYTES, source.size))
