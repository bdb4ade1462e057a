"""Models at URLs: a few range requests to a real HTTP server, and one clear sentence if it cannot answer them."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from pascaline.errors import ModelError
from pascaline.models import remote
from pascaline.models.gguf import read_gguf
from pascaline.models.reader import read_model
from pascaline.models.remote import BLOCK_BYTES
from pascaline.models.safetensors import INDEX_NAME, read_safetensors
from support.models import SHAPES, tiny, write_gguf
from support.raw_models import CONFIG, gguf_file, safetensors_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Site:
    """A folder served over HTTP, with ways to serve it badly."""

    folder: Path
    url: str = ""
    fault: str = ""
    """What goes wrong: see Handler."""
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, first and last byte of each range that was asked for."""

    @property
    def bytes_sent(self) -> int:
        return sum(end + 1 - start for _, start, end in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Answers range requests as RFC 9110 wants it, but for the fault that the site names."""

    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.site.fault == "redirect" and not path.startswith("/real/"):
            self._redirect("/real" + self.path)
        elif self.site.fault == "redirect loop":
            self._redirect(self.path)
        elif self.site.fault == "status 403":
            self._answer(403, b"", {"X-Error-Message": "Visit the page."})
        else:
            self._serve(path.removeprefix("/real"))

    def _serve(self, path: str) -> None:
        file = self.site.folder / path.lstrip("/")
        if not file.is_file():
            self._answer(404, b"not here", {})
            return
        size = file.stat().st_size
        if self.site.fault == "no ranges":
            self._answer(200, b"", {"Content-Length": str(size)})
            self.close_connection = True
            return
        if not size:
            self._answer(416, b"", {"Content-Range": "bytes */0"})
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match is not None
        start, end = int(match[1]), min(int(match[2]), size - 1)
        self.site.requests.append((path, start, end))
        with file.open("rb") as opened:
            opened.seek(start)
            body = opened.read(end + 1 - start)
        self._answer(206, *self._spoil(body, start, end, size))

    def _spoil(self, body: bytes, start: int, end: int, size: int) -> tuple[bytes, dict[str, str]]:
        headers = {"Content-Range": f"bytes {start}-{end}/{size}", "ETag": '"1"'}
        match self.site.fault:
            case "no content-range":
                del headers["Content-Range"]
            case "unknown size":
                headers["Content-Range"] = f"bytes {start}-{end}/*"
            case "another range":
                headers["Content-Range"] = f"bytes {start + 1}-{end}/{size}"
            case "short":
                headers["Content-Length"] = str(len(body))
                body = body[:-10]
                self.close_connection = True
            case "compressed":
                headers["Content-Encoding"] = "gzip"
            case "changes":
                headers["ETag"] = f'"{len(self.site.requests)}"'
            case "more":
                body += b"more"
        return body, headers

    def _redirect(self, target: str) -> None:
        self._answer(302, b"", {"Location": target})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, content in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, content)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    handler = type("SiteHandler", (Handler,), {"site": site})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()


def refusal(site: Site, path: str = "/m.gguf") -> str:
    with pytest.raises(ModelError) as raised:
        read_model(site.url + path)
    return str(raised.value).replace(site.url, "URL")


class TestGguf:
    def test_the_model_is_the_one_on_disk(self, site: Site) -> None:
        path = write_gguf(site.folder / "m.gguf", tiny("qwen3"), "Q4_K_M")
        remote, local = read_model(f"{site.url}/m.gguf"), read_gguf(path)
        assert remote.tensors == local.tensors
        assert remote.files == (f"{site.url}/m.gguf",)
        assert (remote.name, remote.file_bytes) == (local.name, local.file_bytes)

    def test_only_the_header_is_fetched(self, site: Site) -> None:
        """A vocabulary of 150,000 with merges is a few MiB of a file of 4.7 GB."""
        path = write_gguf(site.folder / "m.gguf", SHAPES["qwen2.5-7b"], "Q4_K_M", sparse=True)
        spec = read_model(f"{site.url}/m.gguf")
        header_bytes = min(tensor.data_offset for tensor in spec.tensors)
        assert spec.file_bytes == path.stat().st_size > 4_600_000_000
        assert site.bytes_sent <= header_bytes + 2 * BLOCK_BYTES
        assert len(site.requests) <= header_bytes // BLOCK_BYTES + 2

    def test_a_small_file_takes_one_request(self, site: Site) -> None:
        (site.folder / "m.gguf").write_bytes(gguf_file())
        read_model(f"{site.url}/m.gguf")
        assert len(site.requests) == 1

    def test_all_parts_are_read_and_the_query_is_kept(self, site: Site) -> None:
        from support.raw_models import LLAMA, value

        common = {"split.count": value("uint16", 2), "split.tensors.count": value("int32", 0)}
        first, second = LLAMA | {"split.no": value("uint16", 0)}, {"split.no": value("uint16", 1)}
        (site.folder / "a b-00001-of-00002.gguf").write_bytes(gguf_file(first | common))
        (site.folder / "a b-00002-of-00002.gguf").write_bytes(gguf_file(second | common))
        site.folder = _Unquoted(site.folder)  # type: ignore[assignment]  # finds files by their quoted names
        spec = read_model(f"{site.url}/a%20b-00002-of-00002.gguf?download=true#part")
        assert spec.files == tuple(f"{site.url}/a%20b-0000{part}-of-00002.gguf?download=true" for part in (1, 2))

    def test_redirects_are_followed(self, site: Site) -> None:
        (site.folder / "m.gguf").write_bytes(gguf_file())
        site.fault = "redirect"
        assert read_model(f"{site.url}/m.gguf").architecture == "llama"

    def test_a_damaged_file_is_named_by_its_url(self, site: Site) -> None:
        (site.folder / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
        assert refusal(site) == (
            "failed to read URL/m.gguf: it is not a GGUF file: it starts with b'PK\\x03\\x04', must start with b'GGUF'"
        )

    def test_an_empty_file(self, site: Site) -> None:
        (site.folder / "m.gguf").write_bytes(b"")
        assert refusal(site) == "failed to read URL/m.gguf: it is empty; download it again"


class _Unquoted:
    """A folder that is asked with names as they stand in URLs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __truediv__(self, name: str) -> Path:
        return self._folder / name.replace("%20", " ")


class TestBadServers:
    @pytest.mark.parametrize(
        ("fault", "cause"),
        [
            (
                "no ranges",
                "the server sends whole files only (no range requests); download the file, then name its path",
            ),
            (
                "status 403",
                'the server answered 403 Forbidden ("Visit the page."); name a file with an access token in --token-file',
            ),
            ("redirect loop", "Exceeded maximum allowed redirects"),
            ("no content-range", "the server answered with the range '', must be bytes START-END/SIZE"),
            ("unknown size", "the server answered with the range 'bytes 0-319/*', must be bytes START-END/SIZE"),
            ("another range", "the server answered with bytes 1-319/320, asked for were bytes 0-524287"),
            ("compressed", "the server answered with the encoding 'gzip'"),
            ("more", "the server announced 320 bytes and sent more"),
            (
                "short",
                "peer closed connection without sending complete message body (received 310 bytes, expected 320)",
            ),
        ],
    )
    def test_each_fault_has_its_sentence(self, site: Site, fault: str, cause: str) -> None:
        (site.folder / "m.gguf").write_bytes(gguf_file())
        site.fault = fault
        assert refusal(site) == f"failed to read URL/m.gguf: {cause}"

    def test_a_missing_file(self, site: Site) -> None:
        assert refusal(site) == "failed to read URL/m.gguf: the server answered 404 Not Found"

    def test_a_file_that_changes_meanwhile(self, site: Site) -> None:
        write_gguf(site.folder / "m.gguf", SHAPES["llama-2-7b"], "Q4_K_M", sparse=True)
        site.fault = "changes"
        assert refusal(site) == "failed to read URL/m.gguf: it changed on the server while it was read; try again"

    def test_a_server_that_trickles_is_given_up(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        (site.folder / "m.gguf").write_bytes(gguf_file())
        monkeypatch.setattr(remote, "MAX_REQUEST_SECONDS", -1.0)
        assert refusal(site) == "failed to read URL/m.gguf: the server took more than -1 s for 320 bytes"

    def test_messages_hold_no_password_and_no_token(self, site: Site) -> None:
        address = site.url.replace("http://", "http://me:secret@") + "/m.gguf?token=secret"
        with pytest.raises(ModelError) as raised:
            read_model(address)
        assert str(raised.value) == f"failed to read {site.url}/m.gguf: the server answered 404 Not Found"

    def test_no_server(self, site: Site) -> None:
        with pytest.raises(ModelError) as raised:
            read_model("http://127.0.0.1:1/m.gguf")
        assert str(raised.value) == "failed to read http://127.0.0.1:1/m.gguf: [Errno 111] Connection refused"

    @pytest.mark.parametrize("url", ["http://", "http://[/m.gguf", "http:///m.gguf", "http://127.0.0.1:99999/m.gguf"])
    def test_addresses_that_are_none(self, url: str) -> None:
        with pytest.raises(ModelError) as raised:
            read_model(url)
        assert str(raised.value).startswith(f"failed to read {url}")


class TestSafetensors:
    def _write(self, folder: Path, *, index: bool) -> None:
        header = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [16, 8], "data_offsets": [0, 256]}}
        name = "model-00001-of-00001.safetensors" if index else "model.safetensors"
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / name).write_bytes(safetensors_file(header, data_bytes=256))
        if index:
            (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))

    @pytest.mark.parametrize("index", [True, False])
    @pytest.mark.parametrize("path", ["", "/", "/config.json", f"/{INDEX_NAME}", "/model.safetensors"])
    def test_any_address_in_the_folder_leads_to_the_model(self, site: Site, path: str, index: bool) -> None:
        self._write(site.folder, index=index)
        remote, local = read_model(site.url + path), read_safetensors(site.folder)
        assert remote.tensors == local.tensors
        assert remote.files == tuple(f"{site.url}/{file.name}" for file in map(_path, local.files))

    def test_the_pooling_of_an_embedding_model_is_read(self, site: Site) -> None:
        self._write(site.folder, index=False)
        assert read_model(f"{site.url}/").pooling is None
        (site.folder / "1_Pooling").mkdir()
        (site.folder / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
        assert read_model(f"{site.url}/").pooling == "last"
        (site.folder / "1_Pooling/config.json").write_text("{}")
        assert refusal(site, "/") == (
            "failed to read URL/1_Pooling/config.json: it names no single pooling of mean, cls and last token"
        )

    def test_an_index_that_may_not_be_read_is_no_missing_index(self, site: Site) -> None:
        self._write(site.folder, index=True)
        site.fault = "status 403"
        assert refusal(site, "/") == (
            f'failed to read URL/{INDEX_NAME}: the server answered 403 Forbidden ("Visit the page."); '
            "name a file with an access token in --token-file"
        )


def _path(file: Path | str) -> Path:
    assert not isinstance(file, str)
    return file
