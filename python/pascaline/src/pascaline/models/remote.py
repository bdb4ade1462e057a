"""Models at http(s) URLs: headers are read by range requests, so that only a few MiB of a large file are fetched."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import httpx

from pascaline.errors import ModelError
from pascaline.models.gguf import read_gguf_parts
from pascaline.models.safetensors import INDEX_NAME, POOLING_NAME, SINGLE_NAME, read_pooling, read_safetensors_parts
from pascaline.models.server_words import shown_url, status_words

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from contextlib import AbstractContextManager

    from pascaline.models.source import Source
    from pascaline.models.spec import ModelSpec

BLOCK_BYTES = 512 << 10
"""Bytes of one range request."""
TIMEOUT_SECONDS = 30.0
"""Longest silence of the server."""
MAX_REQUEST_SECONDS = 120.0
"""Longest time for one block, even if it arrives steadily."""
MAX_REDIRECTS = 5

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


class _StatusError(ModelError):
    """A refusal that carries the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class HttpSource:
    """A file behind a server that answers range requests."""

    chunk_bytes = BLOCK_BYTES

    def __init__(self, client: httpx.Client, url: str) -> None:
        self.name = shown_url(url)
        self._url = url
        self._client = client
        self._tag = ""
        self.size = 0
        self._start = 0
        self._block = b""
        self._block = self._request(0, BLOCK_BYTES)

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; the first block is kept from the request that found the size."""
        inside = offset - self._start
        if inside >= 0 and inside + size <= len(self._block):
            return self._block[inside : inside + size]
        return self._request(offset, size)

    def _request(self, offset: int, size: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        try:
            with self._client.stream("GET", self._url, headers=headers) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and offset == 0:
                    return b""  # an empty file has no range that could be sent
                wanted = self._check(response, offset, size)
                return self._body(response, wanted)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._fail(str(error).rstrip(".") or type(error).__name__)

    def _check(self, response: httpx.Response, offset: int, size: int) -> int:
        """Check that the answer is the requested range, and return its length."""
        status = response.status_code
        if status == httpx.codes.OK:
            self._fail("the server sends whole files only (no range requests); download the file, then name its path")
        if status != httpx.codes.PARTIAL_CONTENT:
            words = status_words(response, with_token="authorization" in self._client.headers)
            raise _StatusError(f"failed to read {self.name}: the server answered {words}", status)
        text = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(text)
        if match is None:
            self._fail(f"the server answered with the range {text[:80]!r}, must be bytes START-END/SIZE")
        start, end, total = map(int, match.groups())
        if start != offset or end != min(offset + size, total) - 1:
            self._fail(f"the server answered with {text}, asked for were bytes {offset}-{offset + size - 1}")
        if response.headers.get("content-encoding", "identity") != "identity":
            self._fail(f"the server answered with the encoding {response.headers['content-encoding'][:80]!r}")
        self._remember(total, response.headers.get("etag", ""))
        return end + 1 - start

    def _remember(self, total: int, tag: str) -> None:
        if self.size and (total, tag) != (self.size, self._tag):
            self._fail("it changed on the server while it was read; try again")
        self.size, self._tag = total, tag

    def _body(self, response: httpx.Response, wanted: int) -> bytes:
        data = bytearray()
        deadline = time.monotonic() + MAX_REQUEST_SECONDS
        for piece in response.iter_raw():
            data += piece
            if len(data) > wanted:
                break
            if time.monotonic() > deadline:
                self._fail(f"the server took more than {MAX_REQUEST_SECONDS:.0f} s for {wanted} bytes")
        if len(data) != wanted:
            self._fail(f"the server announced {wanted} bytes and sent {'more' if len(data) > wanted else len(data)}")
        return bytes(data)

    def _fail(self, cause: str) -> NoReturn:
        raise ModelError(f"failed to read {self.name}: {cause}")


def read_remote_model(url: str, headers: Mapping[str, str] | None = None) -> ModelSpec:
    """Read a model at a URL: of a GGUF file (any part), of a safetensors file, or of the folder with config.json.

    headers: of the requests, for a server that asks for a token; httpx sends a token to no other host after a redirect.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ModelError(f"failed to read {shown_url(url)}: {error}") from error
    folder, _, name = parts.path.rpartition("/")
    if not name.endswith((".gguf", ".safetensors", ".json")):
        folder, name = parts.path.rstrip("/"), ""

    def locate(part: str) -> str:
        return urlunsplit(parts._replace(path=f"{folder}/{quote(part)}", fragment=""))

    timeout = httpx.Timeout(TIMEOUT_SECONDS)
    with httpx.Client(
        headers=dict(headers or {}), timeout=timeout, follow_redirects=True, max_redirects=MAX_REDIRECTS
    ) as client:

        def open_part(part: str) -> AbstractContextManager[Source]:
            return _open(client, locate(part))

        if name.endswith(".gguf"):
            return read_gguf_parts(unquote(name), open_part, locate)
        names = [SINGLE_NAME] if _is_absent(client, locate(INDEX_NAME)) else None
        spec = read_safetensors_parts(shown_url(locate("")), open_part, locate, names)
        # Some servers answer 403 for what is not there; of this folder, config.json was read just now.
        has_none = _is_absent(client, locate(POOLING_NAME), (httpx.codes.NOT_FOUND, httpx.codes.FORBIDDEN))
        return spec if has_none else replace(spec, pooling=read_pooling(open_part))


@contextmanager
def _open(client: httpx.Client, url: str) -> Iterator[HttpSource]:
    yield HttpSource(client, url)


def _is_absent(client: httpx.Client, url: str, statuses: Container[int] = (httpx.codes.NOT_FOUND,)) -> bool:
    try:
        HttpSource(client, url)
    except _StatusError as error:
        if error.status in statuses:
            return True
        raise
    return False
