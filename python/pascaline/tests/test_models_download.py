"""Downloads from a real HTTP server that misbehaves: what arrives is the file, or one sentence says why it is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pascaline.errors import ModelError, StorageError
from pascaline.models import download
from pascaline.models.download import Download

CONTENT = os.urandom(3 * 2**20 + 17)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = os.urandom(len(CONTENT))


@dataclass
class Site:
    """A server of one file; each request takes the next fault."""

    url: str = ""
    content: bytes = CONTENT
    etag: str = '"one"'
    last_modified: str = ""
    faults: list[str] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)

    @property
    def ranges(self) -> list[str]:
        return [request.get("range", "whole") for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Answers as RFC 9110 wants it, but for the fault of the request."""

    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        site = self.site
        site.requests.append({name.lower(): value for name, value in self.headers.items()})
        fault = site.faults.pop(0) if site.faults else ""
        if fault.startswith("status "):
            self._answer(int(fault.split()[1]), b"", {"Retry-After": "7"} if "after" in fault else {})
            return
        if fault == "redirect":
            self._answer(302, b"", {"Location": "/elsewhere"})
            return
        start = self._start(fault)
        body = site.content[start:]
        headers = {"ETag": site.etag} if site.etag else {}
        headers |= {"Last-Modified": site.last_modified} if site.last_modified else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(site.content) - 1}/{len(site.content)}"
        match fault.split():
            case ["wrong", "range"]:
                headers["Content-Range"] = f"bytes {start - 1}-{len(site.content) - 1}/{len(site.content)}"
            case ["no", "range", "header"]:
                headers.pop("Content-Range", None)
            case ["other", "tag"]:
                headers["ETag"] = '"two"'
            case ["encoded"]:
                headers["Content-Encoding"] = "gzip"
            case ["digest"]:
                headers["X-Sha256"] = headers["Digest"] = hashlib.sha256(b"something else").hexdigest()
            case ["chunked"]:
                self._chunked(body, headers)
                return
        length = len(body)
        if fault.startswith("cut "):
            body = body[: int(fault.split()[1])]
            self.close_connection = True
        self._answer(206 if start else 200, body, headers | {"Content-Length": str(length)})

    def _start(self, fault: str) -> int:
        """First byte that is sent: as asked for, where If-Range holds."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        validators = {self.site.etag, self.site.last_modified}
        if match is None or fault == "no ranges":
            return 0
        lying = fault in ("wrong range", "no range header", "other tag")
        return int(match[1]) if lying or self.headers.get("If-Range") in validators else 0

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _chunked(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Transfer-Encoding": "chunked"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))


class Server(ThreadingHTTPServer):
    """Says nothing where a client hangs up."""

    def handle_error(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}/m.gguf"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf.partial"


def fetch(site: Site, partial: Path, pauses: list[float] | None = None) -> str:
    return Download(site.url, partial, sleep=(pauses if pauses is not None else []).append).fetch()


def interrupted(site: Site, partial: Path, size: int = 2**20) -> None:
    """Leave what a process leaves that was ended after `size` bytes."""
    site.faults[:] = [f"cut {size}"] + ["status 503"] * download.MAX_FAILURES
    with pytest.raises(ModelError):
        fetch(site, partial)
    site.faults.clear()
    site.requests.clear()
    assert partial.stat().st_size == size


class TestFetch:
    def test_whole_file(self, site: Site, partial: Path) -> None:
        """One request, the file, its digest, and nothing else left behind."""
        assert fetch(site, partial) == DIGEST
        assert partial.read_bytes() == CONTENT
        assert site.ranges == ["whole"]
        assert list(partial.parent.iterdir()) == [partial]

    @pytest.mark.parametrize("fault", ["chunked", "redirect", "digest"])
    def test_unusual_answers_that_are_right(self, site: Site, partial: Path, fault: str) -> None:
        """No length, another place, and a digest of the server's own, which is not believed, are no reason to fail."""
        site.faults[:] = [fault]
        assert fetch(site, partial) == DIGEST
        assert partial.read_bytes() == CONTENT

    def test_empty_file(self, site: Site, partial: Path) -> None:
        """Zero bytes are a file too."""
        site.content = b""
        assert fetch(site, partial) == hashlib.sha256(b"").hexdigest()

    def test_progress_never_goes_back_without_a_new_beginning(self, site: Site, partial: Path) -> None:
        """The last call says that all is done."""
        seen: list[tuple[int, int | None]] = []
        Download(site.url, partial, on_bytes=lambda done, total: seen.append((done, total))).fetch()
        assert seen[0] == (0, len(CONTENT))
        assert seen[-1] == (len(CONTENT), len(CONTENT))
        assert seen == sorted(seen)


class TestResume:
    def test_connection_that_breaks(self, site: Site, partial: Path) -> None:
        """Within one call the rest alone is asked for, on condition that the file is the same."""
        site.faults[:] = ["cut 1000000"]
        assert fetch(site, partial) == DIGEST
        assert site.ranges == ["whole", "bytes=1000000-"]
        assert site.requests[1]["if-range"] == '"one"'
        assert partial.read_bytes() == CONTENT

    def test_another_process_goes_on(self, site: Site, partial: Path) -> None:
        """What a process left that was ended is not fetched again."""
        interrupted(site, partial)
        assert fetch(site, partial) == DIGEST
        assert site.ranges == [f"bytes={2**20}-"]

    def test_last_modified_where_there_is_no_strong_tag(self, site: Site, partial: Path) -> None:
        """A weak ETag does not promise equal bytes; the date does."""
        site.etag, site.last_modified = 'W/"one"', "Tue, 24 Nov 2026 08:00:00 GMT"
        interrupted(site, partial)
        assert fetch(site, partial) == DIGEST
        assert site.requests[0]["if-range"] == site.last_modified

    def test_without_validators_it_begins_anew(self, site: Site, partial: Path) -> None:
        """Where nothing says that the file is the same, nothing is appended."""
        site.etag = ""
        site.faults[:] = ["cut 1000000"]
        assert fetch(site, partial) == DIGEST
        assert site.ranges == ["whole", "whole"]

    def test_file_that_changed_meanwhile(self, site: Site, partial: Path) -> None:
        """The new version arrives whole, and not half of each."""
        interrupted(site, partial)
        site.content, site.etag = OTHER, '"two"'
        assert fetch(site, partial) == hashlib.sha256(OTHER).hexdigest()
        assert partial.read_bytes() == OTHER

    @pytest.mark.parametrize("fault", ["wrong range", "no range header", "other tag", "no ranges", "status 416"])
    def test_answers_that_are_not_the_rest(self, site: Site, partial: Path, fault: str) -> None:
        """A wrong 206, a 200 and a 416 are never appended: the whole file is fetched."""
        interrupted(site, partial)
        site.faults[:] = [fault]
        assert fetch(site, partial) == DIGEST
        assert partial.read_bytes() == CONTENT
        assert site.ranges[0] == f"bytes={2**20}-"
        assert len(site.ranges) == 1 or site.ranges[1:] == ["whole"]

    @pytest.mark.parametrize("note", ["", "[]", '{"url": 1}'])
    def test_damaged_notes(self, site: Site, partial: Path, note: str) -> None:
        """A partial file without a note that can be believed is not used."""
        partial.write_bytes(b"x" * 100)
        partial.with_name(partial.name + ".json").write_text(note)
        assert fetch(site, partial) == DIGEST
        assert site.ranges == ["whole"]

    def test_partial_of_another_address(self, site: Site, partial: Path) -> None:
        """What came from another URL is not completed from this one."""
        interrupted(site, partial)
        note = partial.with_name(partial.name + ".json")
        note.write_text(json.dumps(json.loads(note.read_text()) | {"url": "http://127.0.0.1/other"}))
        assert fetch(site, partial) == DIGEST
        assert site.ranges == ["whole"]


class TestFailures:
    def test_pauses_grow_and_follow_the_server(self, site: Site, partial: Path) -> None:
        """Attempts back off, and wait for as long as the server asks."""
        site.faults[:] = ["status 503", "status 500", "status 429 after"]
        pauses: list[float] = []
        assert fetch(site, partial, pauses) == DIGEST
        assert pauses == [1.0, 2.0, 7.0]

    def test_gives_up(self, site: Site, partial: Path) -> None:
        """A server that keeps failing ends the download, and its answer is reported."""
        site.faults[:] = ["status 503"] * 100
        with pytest.raises(ModelError) as caught:
            fetch(site, partial)
        assert str(caught.value) == (
            f"failed to download {site.url}: the server answered 503 Service Unavailable (5 times); "
            "nothing was fetched, try again later"
        )
        assert len(site.requests) == download.MAX_FAILURES

    @pytest.mark.parametrize(
        ("etag", "then", "prospect"),
        [
            ('"one"', "cut 0", "the part that was fetched is kept; run the same command to continue"),
            (
                "",
                "cut 300000",
                "the server names no version (ETag, Last-Modified, length), so the same command starts again",
            ),
        ],
    )
    def test_what_the_same_command_will_do_is_true(
        self, site: Site, partial: Path, etag: str, then: str, prospect: str
    ) -> None:
        """Going on is promised only where the next command will."""
        site.etag, site.faults[:] = etag, ["cut 300000", *[then] * 99]
        with pytest.raises(ModelError) as caught:
            fetch(site, partial)
        assert str(caught.value).endswith(f" (5 times); {prospect}")
        site.faults.clear()
        site.requests.clear()
        assert fetch(site, partial) == DIGEST
        assert (site.ranges == ["whole"]) == ("starts again" in prospect)

    def test_progress_renews_patience(self, site: Site, partial: Path) -> None:
        """A line that breaks every few hundred kilobytes still gets the file, however often."""
        site.faults[:] = ["cut 300000"] * 10
        assert fetch(site, partial) == DIGEST
        assert len(site.requests) == 11

    @pytest.mark.parametrize(
        ("fault", "cause"),
        [
            ("status 404", "the server answered 404 Not Found"),
            ("status 401", "the server answered 401 Unauthorized; name a file with an access token in --token-file"),
            ("encoded", "the server answered with the encoding 'gzip'"),
        ],
    )
    def test_what_no_attempt_can_mend(self, site: Site, partial: Path, fault: str, cause: str) -> None:
        """A refusal is reported at once."""
        site.faults[:] = [fault]
        with pytest.raises(ModelError) as caught:
            fetch(site, partial)
        assert str(caught.value) == f"failed to download {site.url}: {cause}"
        assert len(site.requests) == 1

    def test_no_server(self, partial: Path) -> None:
        """A port without a listener is retried, then reported without the secrets of the URL."""
        with pytest.raises(ModelError) as caught:
            Download("http://user:password@127.0.0.1:9/m.gguf?sig=x", partial, sleep=lambda _: None).fetch()
        assert str(caught.value) == (
            "failed to download http://127.0.0.1:9/m.gguf: [Errno 111] Connection refused (5 times); "
            "nothing was fetched, try again later"
        )

    def test_redirects_without_end(self, site: Site, partial: Path) -> None:
        """A circle is no transport problem, and is not walked again."""
        site.faults[:] = ["redirect"] * 100
        with pytest.raises(ModelError) as caught:
            fetch(site, partial)
        assert str(caught.value) == f"failed to download {site.url}: Exceeded maximum allowed redirects"

    def test_disk_without_room(self, site: Site, partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is larger than the disk is refused before its first byte, with the numbers."""
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("pascaline.models.download.shutil.disk_usage", lambda _: usage)
        with pytest.raises(StorageError) as caught:
            fetch(site, partial)
        assert str(caught.value) == (
            f"no space in {partial.parent}: 1000 bytes are free, {len(CONTENT)} more are needed; "
            "make room (pascaline models gc), or name another folder with --store"
        )

    def test_folder_that_cannot_be_written(self, site: Site, tmp_path: Path) -> None:
        """A file system error is reported with the folder."""
        (tmp_path / "m.gguf.partial.json").mkdir()
        with pytest.raises(StorageError) as caught:
            fetch(site, tmp_path / "m.gguf.partial")
        assert str(caught.value) == (
            f"failed to write to {tmp_path}: Is a directory; name a folder of this user with --store"
        )
