"""Downloads one file. It is resumed only if the server proves that the rest belongs to what is here; it is not trusted.

What was fetched so far lies in FILE.partial, with FILE.partial.json beside it: the URL and the server's validators.
Only a 206 for exactly the missing range of the same version is appended; anything else starts again. A digest from the
server is ignored: an attacker who can replace the file can replace the digest too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pascaline.errors import NotFetchedError, StorageError
from pascaline.models.server_words import shown_url, status_words

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import httpx

TIMEOUT_SECONDS = 30.0
"""Longest silence of the server."""
MAX_FAILURES = 5
"""Failures in a row without a byte of progress, after which a download is given up."""
MAX_PAUSE_SECONDS = 60.0
"""Longest pause between two attempts, even if the server asks for more."""
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

OnBytes = Callable[[int, int | None], None]
"""Called with (bytes done, bytes in all or None if the server does not say)."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of a file the server sent, according to its headers."""

    url: str
    etag: str
    """Empty if there is none, or only a weak one, which does not promise equal bytes."""
    last_modified: str
    size: int | None

    @property
    def validator(self) -> str:
        """Value for If-Range; empty if the download cannot be resumed."""
        return self.etag or self.last_modified


class _RetryError(Exception):
    """The attempt failed, but another one may succeed."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class Download:
    """The download of one file."""

    def __init__(
        self,
        url: str,
        partial: Path,
        *,
        headers: Mapping[str, str] | None = None,
        on_bytes: OnBytes = lambda _done, _total: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """partial: where to write; headers: of every request; sleep: between attempts."""
        self._url = url
        self._partial = partial
        self._note = partial.with_name(partial.name + ".json")
        self._headers = dict(headers or {})
        self._on_bytes = on_bytes
        self._sleep = sleep
        self._digest = hashlib.sha256()
        self._done = 0
        self._version: Version | None = None
        self.resumed = False
        """Whether the file begins with data of an earlier process, which may be damaged if that process was killed."""

    def fetch(self) -> str:
        """Fetch the file into `partial` and return its sha256, computed from what was written.

        Raises NotFetchedError if the server does not have it or gave up, StorageError if the disk is full. The fetched
        part stays for the next attempt.
        """
        # Not at the top: an agent, which fetches nothing, would carry its 5 MiB for ever.
        import httpx

        self._take_up()
        failures = 0
        timeout = httpx.Timeout(TIMEOUT_SECONDS)
        with httpx.Client(timeout=timeout, follow_redirects=True, max_redirects=MAX_REDIRECTS) as client:
            while True:
                before = self._done
                try:
                    self._attempt(client)
                except _RetryError as error:
                    failures = 1 if self._done > before else failures + 1
                    if failures >= MAX_FAILURES:
                        raise NotFetchedError(
                            f"failed to download {shown_url(self._url)}: {error} ({failures} times); {self._prospect}"
                        ) from error
                    self._sleep(min(error.pause or 2.0 ** (failures - 1), MAX_PAUSE_SECONDS))
                except OSError as error:
                    size = self._version.size if self._version else None
                    raise storage_error(error, self._partial.parent, size) from error
                else:
                    self._note.unlink(missing_ok=True)
                    return self._digest.hexdigest()

    @property
    def _prospect(self) -> str:
        """Say what the same command will do when it is run again."""
        if not self._done:
            return "nothing was fetched, try again later"
        if self._version and self._version.validator and self._version.size is not None:
            return "the part that was fetched is kept; run the same command to continue"
        return "the server names no version (ETag, Last-Modified, length), so the same command starts again"

    def _take_up(self) -> None:
        """Continue from the data of an earlier process, if the server proves that it is a part of the file."""
        for path in (self._partial, self._note):
            if path.is_symlink():
                path.unlink()
        try:
            version = Version(**json.loads(self._note.read_text()))
            size = self._partial.stat().st_size
        except (OSError, ValueError, TypeError):
            return
        if version.url != self._url or not version.validator or version.size is None or not 0 < size < version.size:
            return  # the first attempt begins anew
        with self._partial.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self._digest.update(chunk)
                self._done += len(chunk)
        self._version, self.resumed = version, True

    def _attempt(self, client: httpx.Client) -> None:
        import httpx

        headers = self._headers | {"Accept-Encoding": "identity"}
        if self._done and self._version and self._version.validator and self._version.size is not None:
            headers |= {"Range": f"bytes={self._done}-", "If-Range": self._version.validator}
        else:
            self._begin_anew()
        try:
            with client.stream("GET", self._url, headers=headers) as response:
                self._check(response)
                self._write(response)
        except httpx.TransportError as error:
            raise _RetryError(str(error).rstrip(".") or type(error).__name__) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._fail(str(error).rstrip("."))
        if self._version and self._version.size not in (None, self._done):
            raise _RetryError(f"the server sent {self._done} of {self._version.size} bytes")

    def _begin_anew(self) -> None:
        self._digest, self._done, self._version, self.resumed = hashlib.sha256(), 0, None, False
        self._note.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)

    def _check(self, response: httpx.Response) -> None:
        """Decide by status and headers what the body contains."""
        status = response.status_code
        if response.headers.get("content-encoding", "identity") != "identity":
            self._fail(f"the server answered with the encoding {response.headers['content-encoding'][:80]!r}")
        if status == HTTPStatus.PARTIAL_CONTENT and self._done:
            if (problem := self._range_problem(response)) is not None:
                self._begin_anew()
                raise _RetryError(problem, pause=0.001)
        elif status == HTTPStatus.OK:
            # A new version, or a server without ranges: the data so far cannot be used.
            self._begin_anew()
            self._version = _version_of(self._url, response)
        elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and self._done:
            self._begin_anew()
            raise _RetryError("the server has no such range", pause=0.001)
        elif status in RETRIED_STATUS:
            raise _RetryError(f"the server answered {self._words(response)}", _retry_after(response))
        else:
            self._fail(f"the server answered {self._words(response)}")

    def _words(self, response: httpx.Response) -> str:
        return status_words(response, with_token=any(name.lower() == "authorization" for name in self._headers))

    def _range_problem(self, response: httpx.Response) -> str | None:
        """Why a 206 is not the rest of the file; None if it is."""
        assert self._version is not None
        text = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(text)
        size = self._version.size
        if match is None or tuple(map(int, match.groups())) != (self._done, (size or 0) - 1, size):
            return (
                f"the server answered with the range {text[:80]!r}, must be bytes {self._done}-{(size or 0) - 1}/{size}"
            )
        found = _version_of(self._url, response)
        if (self._version.etag and found.etag and found.etag != self._version.etag) or (
            found.last_modified and found.last_modified != self._version.last_modified
        ):
            return "the file changed on the server"
        return None

    def _write(self, response: httpx.Response) -> None:
        """Append the body, counted and hashed as it is written."""
        assert self._version is not None
        size = self._version.size
        self._require_space((size - self._done) if size is not None else 0)
        try:
            with open(self._note, "w", opener=_not_through_links) as note:
                note.write(json.dumps(asdict(self._version)))
            with open(self._partial, "ab", opener=_not_through_links) as file:
                self._on_bytes(self._done, size)
                # Pieces as they arrive: a piece of a fixed size would be lost if the connection breaks.
                for chunk in response.iter_raw():
                    if size is not None and self._done + len(chunk) > size:
                        raise _RetryError(f"the server sent more than the {size} bytes that it announced")
                    file.write(chunk)
                    self._digest.update(chunk)
                    self._done += len(chunk)
                    self._on_bytes(self._done, size)
                file.flush()
                os.fsync(file.fileno())
        finally:
            # The hashed bytes and those on disk must be the same when the next attempt continues from here.
            with contextlib.suppress(OSError), open(self._partial, "r+b", opener=_not_through_links) as file:
                file.truncate(self._done)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._partial.parent).free
        if free < needed:
            raise full_disk(self._partial.parent, free, needed)

    def _fail(self, cause: str) -> Any:
        raise NotFetchedError(f"failed to download {shown_url(self._url)}: {cause}")


def _not_through_links(path: str, flags: int) -> int:
    """Open a file that this module made itself. The folder may be one in which others can put links."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def full_disk(folder: Path, free: int, needed: int) -> StorageError:
    """Return the error of a disk that cannot take `needed` more bytes."""
    return StorageError(
        f"no space in {folder}: {free} bytes are free, {needed} more are needed; "
        "make room (pascaline models gc), or name another folder with --store"
    )


def storage_error(error: OSError, folder: Path, needed: int | None) -> StorageError:
    """Return the error for a failure to write."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return full_disk(folder, shutil.disk_usage(folder).free, needed or 0)
    return StorageError(f"failed to write to {folder}: {error.strerror}; name a folder of this user with --store")


def _version_of(url: str, response: httpx.Response) -> Version:
    etag = response.headers.get("etag", "")
    length = response.headers.get("content-length", "")
    whole = response.status_code == HTTPStatus.OK
    return Version(
        url=url,
        etag="" if etag.startswith("W/") else etag,
        last_modified=response.headers.get("last-modified", ""),
        size=int(length) if whole and length.isascii() and length.isdigit() else None,
    )


def _retry_after(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
