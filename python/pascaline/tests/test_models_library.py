"""The library of model files: whole or not there, verified against a sha256 that a person gave, safe from each other."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from pascaline.engines.served import refusal_of_all
from pascaline.errors import ConfigurationError, ModelError, StorageError
from pascaline.models import library
from pascaline.models.folder_files import folder_files, folder_sha256
from pascaline.models.library import (
    LOCK,
    PARTIAL,
    SEEN,
    VERIFIED,
    add,
    delete,
    entries,
    find,
    garbage,
    problems,
    remove,
    verify,
)
from pascaline.models.reader import read_model
from support.hf_models import write_folder
from support.models import split_gguf, tiny, write_gguf

WRONG = "0" * 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.Q4_K_M.gguf", tiny("llama"), "Q4_K_M")


@pytest.fixture(scope="module")
def digest(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(model.parent))

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    (model.parent / "login.gguf").write_text("<html>please log in</html>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def resuming(model: Path) -> Iterator[str]:
    """The address of a server that goes on from a byte."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = model.read_bytes()
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"one"')
            self.send_header("Last-Modified", "Sun, 29 Nov 2026 00:00:00 GMT")
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


class TestAdd:
    def test_from_a_url(self, store: Path, url: str, model: Path, digest: str) -> None:
        """The file is in its folder, with a stamp that says when it was verified."""
        added = add(store, "emily", f"{url}/{model.name}", digest)
        assert (added.path, added.sha256, added.was_there, added.verified) == (
            store / "emily" / model.name,
            digest,
            False,
            True,
        )
        assert added.path.read_bytes() == model.read_bytes()
        assert names(store / "emily") == [".lock", model.name, f"{model.name}.verified"]

    def test_from_a_path(self, store: Path, model: Path, digest: str) -> None:
        """A copy, so that the original may go."""
        assert add(store, "emily", str(model), digest).path.read_bytes() == model.read_bytes()

    def test_again(self, store: Path, model: Path, digest: str) -> None:
        """What is in place and verified is not fetched again, even if the source is gone."""
        add(store, "emily", str(model), digest)
        assert add(store, "emily", f"/gone/{model.name}", digest).was_there

    def test_wrong_checksum(self, store: Path, url: str, model: Path, digest: str) -> None:
        """A file with another checksum does not stay, under any name."""
        with pytest.raises(ModelError) as caught:
            add(store, "emily", f"{url}/{model.name}", WRONG)
        assert str(caught.value) == (
            f"{url}/{model.name} has sha256 {digest}, must be {WRONG}; "
            "the file was deleted: correct --sha256, or the source"
        )
        assert names(store / "emily") == [".lock"]

    def test_without_checksum(self, store: Path, model: Path, digest: str) -> None:
        """Nobody vouched for the file, so it does not count as verified."""
        added = add(store, "emily", str(model))
        assert (added.sha256, added.verified) == (digest, False)
        assert [entry.state for entry in entries(store)] == ["unverified"]

    def test_another_file_under_the_same_name(self, store: Path, model: Path, digest: str) -> None:
        """What is there is not overwritten."""
        add(store, "emily", str(model), digest)
        with pytest.raises(ModelError) as caught:
            add(store, "emily", str(model), WRONG)
        assert str(caught.value) == (
            f"{store / 'emily' / model.name} is there already and has sha256 {digest}, must be {WRONG}; "
            "to replace it: pascaline models remove emily"
        )

    def test_page_that_asks_to_log_in(self, store: Path, url: str) -> None:
        """An answer of 200 that is no model is refused although no checksum was given."""
        with pytest.raises(ModelError) as caught:
            add(store, "emily", f"{url}/login.gguf")
        assert str(caught.value).endswith("; the file was deleted")
        assert names(store / "emily") == [".lock"]

    @pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "-x"])
    def test_names_that_are_no_folders(self, store: Path, model: Path, name: str) -> None:
        """A name cannot lead out of the library."""
        with pytest.raises(ConfigurationError) as caught:
            add(store, name, str(model))
        assert str(caught.value) == f"name: invalid value {name!r}, must be letters, digits, '.', '_' and '-'"

    @pytest.mark.parametrize(
        "source", ["http://127.0.0.1/", "http://127.0.0.1/..", "http://127.0.0.1/a%2F..%2Fb", "/x/.y"]
    )
    def test_sources_that_name_no_file(self, store: Path, source: str) -> None:
        """Nor can a URL."""
        with pytest.raises(ConfigurationError, match="names no file"):
            add(store, "emily", source)

    def test_checksum_that_is_none(self, store: Path, model: Path) -> None:
        """A mistyped checksum is reported before anything is fetched."""
        with pytest.raises(ConfigurationError) as caught:
            add(store, "emily", str(model), "ABC")
        assert str(caught.value) == (
            "--sha256: invalid value 'ABC', must be 64 hexadecimal digits; for a split model, 64 for each of its "
            "parts, in order"
        )

    def test_checksum_in_capitals(self, store: Path, model: Path, digest: str) -> None:
        """Windows' tools print them so."""
        assert add(store, "emily", str(model), digest.upper()).sha256 == digest

    def test_source_that_is_missing(self, store: Path) -> None:
        """A path without a file is reported as such."""
        with pytest.raises(ModelError) as caught:
            add(store, "emily", "/no/such/file.gguf")
        assert str(caught.value) == "failed to read /no/such/file.gguf: No such file or directory"

    def test_full_disk(self, store: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy that has no room is not begun."""
        monkeypatch.setattr("pascaline.models.library.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
        with pytest.raises(StorageError) as caught:
            add(store, "emily", str(model))
        assert str(caught.value) == (
            f"no space in {store / 'emily'}: 5 bytes are free, {model.stat().st_size} more are needed; "
            "make room (pascaline models gc), or name another folder with --store"
        )

    def test_disk_that_fills_meanwhile(self, tmp_path: Path, model: Path) -> None:
        """On a real file system of one megabyte the copy fails as a full disk and leaves nothing."""
        script = f"""
import sys
from pathlib import Path
from pascaline.models import library
library.shutil.disk_usage = lambda _: type("Usage", (), {{"free": 2**40}})
try:
    library.add(Path("{tmp_path}/small"), "emily", "{model}")
except Exception as error:
    print(type(error).__name__, str(error).split(";")[0])
print(sorted(p.name for p in Path("{tmp_path}/small/emily").iterdir()))
"""
        (tmp_path / "small").mkdir()
        mount = f"mount -t tmpfs -o size=1m none {tmp_path}/small && exec {sys.executable} -c '{script}'"
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if "unshare" in done.stderr or "mount" in done.stderr:
            pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
        assert done.stdout.splitlines() == [
            f"StorageError no space in {tmp_path}/small/emily: {2**40} bytes are free, "
            f"{model.stat().st_size} more are needed",
            "['.lock']",
        ]

    def test_two_at_once(self, store: Path, url: str, model: Path, digest: str) -> None:
        """Two processes that add the same model end with one whole file."""
        command = [sys.executable, "-m", "pascaline", "models", "add", "emily", f"{url}/{model.name}"]
        command += ["--sha256", digest, "--store", str(store)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        output = sorted(process.communicate(timeout=120)[0] for process in both)
        assert [process.returncode for process in both] == [0, 0]
        path = store / "emily" / model.name
        assert output == [
            f"{path}: is in place, sha256 {digest}, verified\n",
            f"{path}: was there already, sha256 {digest}, verified\n",
        ]

    def test_a_target_of_ones_own(self, store: Path, url: str, model: Path, digest: str, tmp_path: Path) -> None:
        """As the NixOS module names it: another folder, and a name that is not the source's."""
        target = tmp_path / "elsewhere" / "my%20emily.gguf"
        added = add(store, "emily", f"{url}/{model.name}", digest, target=target)
        assert (added.path, target.read_bytes()) == (target, model.read_bytes())
        assert add(store, "emily", "/gone/model.gguf", digest, target=target).was_there
        assert not store.exists()

    def test_a_url_of_a_file(self, store: Path, model: Path, digest: str) -> None:
        source = f"file://{str(model).replace('m', '%6D')}"
        assert add(store, "emily", source, digest).path == store / "emily" / model.name

    def test_a_file_with_another_checksum_is_brought_again_if_it_may_be_replaced(
        self, store: Path, model: Path, digest: str
    ) -> None:
        """Damaged, or of the checksum that was declared before."""
        path = add(store, "emily", str(model), digest).path
        path.write_bytes(b"damaged")
        with pytest.raises(ModelError, match="is there already"):
            add(store, "emily", str(model), digest)
        added = add(store, "emily", str(model), digest, replace=True)
        assert (added.was_there, added.verified, path.read_bytes()) == (False, True, model.read_bytes())

    def test_a_checksum_vouches_for_a_file_that_cannot_be_read(self, store: Path, tmp_path: Path) -> None:
        """It is what was asked for; `plan` and `serve` say why they refuse it, and it is not brought again and again."""
        file = tmp_path / "page.gguf"
        file.write_text("<html>")
        added = add(store, "emily", str(file), hashlib.sha256(b"<html>").hexdigest())
        assert (added.verified, added.path.read_text()) == (True, "<html>")

    def test_the_script_of_the_module(self, store: Path, model: Path, digest: str) -> None:
        target = store / "elsewhere.gguf"
        script = Path(__file__).parents[3] / "modules" / "fetch-model.sh"
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        command = ["sh", str(script), str(model), str(target), digest]
        done = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"{target}: is in place, sha256 {digest}, verified\n")
        assert subprocess.run(command[:3], capture_output=True, check=False).returncode == 2

    def test_what_is_there_stays_until_the_new_file_is_whole(self, store: Path, model: Path, digest: str) -> None:
        path = add(store, "emily", str(model), digest).path
        with pytest.raises(ModelError, match="must be"):
            add(store, "emily", str(model), WRONG, replace=True)
        assert path.read_bytes() == model.read_bytes()

    def test_only_what_may_succeed_later_is_worth_another_try(self, store: Path, model: Path, tmp_path: Path) -> None:
        """By the exit code: the NixOS unit starts again after 1, and not after 3."""
        text = tmp_path / "page.gguf"
        text.write_text("<html>please log in</html>")
        command = [sys.executable, "-m", "pascaline", "models", "add", "emily", "--store", str(store)]
        codes = [
            subprocess.run([*command, *more], capture_output=True, check=False).returncode
            for more in (["/gone/model.gguf"], [str(model), f"--sha256={WRONG}"], [str(text)])
        ]
        assert codes == [1, 3, 3]


class TestSplitModels:
    @pytest.fixture
    def parts(self, model: Path) -> Iterator[list[Path]]:
        """Parts in the folder that the server serves."""
        parts = split_gguf(shutil.copy(model, model.with_name("split.gguf")), 3)
        yield parts
        for part in parts:
            part.unlink(missing_ok=True)

    @pytest.mark.parametrize("named", [0, 2])
    @pytest.mark.parametrize("remote", [False, True])
    def test_any_part_brings_all(self, store: Path, url: str, parts: list[Path], named: int, remote: bool) -> None:
        digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
        source = f"{url}/{parts[named].name}?download=true" if remote else str(parts[named])
        told: list[tuple[int, int]] = []

        def on_part(part: int, count: int) -> Callable[[int, int | None], None]:
            told.append((part, count))
            return lambda _done, _total: None

        added = add(store, "emily", source, digests, on_part=on_part)
        assert (added.path, added.sha256, added.verified) == (store / "emily" / parts[0].name, ",".join(digests), True)
        assert told == [(0, 3), (1, 3), (2, 3)]
        assert [entry.state for entry in entries(store)] == ["verified"] * 3
        assert problems(entries(store), refusal_of_all) == []
        assert add(store, "emily", source).was_there

    def test_one_checksum_is_not_enough(self, store: Path, parts: list[Path]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            add(store, "emily", str(parts[0]), WRONG)
        assert str(caught.value) == (
            "--sha256: 1 given, and each covers one file alone; must be 3, for: "
            + ", ".join(part.name for part in parts)
        )
        assert not store.exists()

    def test_damage_in_the_second_part(self, store: Path, parts: list[Path]) -> None:
        digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
        path = add(store, "emily", str(parts[0]), digests).path.with_name(parts[1].name)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert [entry.state for entry in verify(store, "emily")] == ["verified", "changed", "verified"]

    def test_a_part_that_is_missing_there(self, store: Path, parts: list[Path]) -> None:
        parts[1].unlink()
        with pytest.raises(ModelError) as caught:
            add(store, "emily", str(parts[0]))
        assert str(caught.value) == f"failed to read {parts[1]}: No such file or directory"

    def test_a_part_of_another_model(self, store: Path, parts: list[Path]) -> None:
        """What is kept is said to be no model, by add and by verify."""
        shutil.copy(parts[0], parts[1])
        with pytest.raises(ModelError) as caught:
            add(store, "emily", str(parts[0]))
        assert str(caught.value).endswith("; to begin again: pascaline models remove emily")
        [problem] = problems(entries(store), refusal_of_all)
        assert "its name says part 2 of 3 of the split model, its header part 1" in problem

    def test_a_part_that_was_removed(self, store: Path, parts: list[Path]) -> None:
        add(store, "emily", str(parts[0])).path.with_name(parts[2].name).unlink()
        [problem] = problems(entries(store), refusal_of_all)
        assert problem.startswith("part 3 of 3 of the split model cannot be read: ")


class TestLinks:
    """A link in the store may lead anywhere; what it points to is neither written to nor deleted."""

    @pytest.fixture
    def precious(self, tmp_path: Path) -> Path:
        path = tmp_path / "outside/precious"
        path.parent.mkdir()
        path.write_text("precious")
        return path

    @pytest.mark.parametrize("name", [PARTIAL, VERIFIED, SEEN])
    def test_in_place_of_a_file_beside_the_model(self, store: Path, model: Path, precious: Path, name: str) -> None:
        path = add(store, "emily", str(model)).path
        for each in (path, path.with_name(path.name + name)):
            each.unlink(missing_ok=True)
        path.with_name(path.name + name).symlink_to(precious)
        added = add(store, "emily", str(model), hashlib.sha256(model.read_bytes()).hexdigest())
        assert added.path.read_bytes() == model.read_bytes()
        verify(store, "emily")
        assert precious.read_text() == "precious"

    def test_in_place_of_the_lock(self, store: Path, model: Path, precious: Path) -> None:
        add(store, "emily", str(model))
        (store / "emily" / LOCK).unlink()
        (store / "emily" / LOCK).symlink_to(precious)
        with pytest.raises(StorageError) as caught:
            verify(store, "emily")
        assert str(caught.value) == (
            f"failed to write to {store / 'emily'}: Too many levels of symbolic links; "
            "name a folder of this user with --store"
        )
        assert precious.read_text() == "precious"

    def test_in_place_of_the_model(self, store: Path, model: Path, precious: Path) -> None:
        path = add(store, "emily", str(model)).path
        path.unlink()
        path.symlink_to(precious)
        assert [entry.state for entry in verify(store, "emily")] == ["changed"]
        remove(store, "emily")
        assert not (store / "emily").exists()
        assert precious.read_text() == "precious"

    def test_in_place_of_the_folder(self, store: Path, precious: Path) -> None:
        store.mkdir()
        (store / "emily").symlink_to(precious.parent)
        with pytest.raises(ModelError) as caught:
            remove(store, "emily")
        assert str(caught.value) == (
            f"{store / 'emily'} is a link to {precious.parent}, which is not deleted; "
            f"to remove the link: rm {store / 'emily'}"
        )
        (precious.parent / LOCK).touch()
        [waste] = garbage(store, store.parent / "cache", keep=frozenset())
        delete(waste)
        assert not (store / "emily").is_symlink()
        assert precious.read_text() == "precious"


class TestFolders:
    """Hugging Face folders: one checksum for every file that decides what is served."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        path = write_folder(tmp_path / "source", tiny("qwen3"))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
        (path / "README.md").write_text("not read by an engine")
        return path

    def digest(self, folder: Path) -> str:
        names = folder_files(folder)
        assert names == ("1_Pooling/config.json", "config.json", "model.safetensors")
        return folder_sha256(names, [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names])

    def test_all_files_are_brought(self, store: Path, folder: Path) -> None:
        added = add(store, "emily", str(folder), self.digest(folder))
        assert (added.path, added.sha256, added.verified) == (store / "emily", self.digest(folder), True)
        assert read_model(added.path).pooling == "last"
        assert find(store, "emily") == added.path
        assert add(store, "emily", str(folder)).was_there
        assert {entry.state for entry in verify(store, "emily")} == {"verified"}

    def test_another_checksum(self, store: Path, folder: Path) -> None:
        with pytest.raises(ModelError) as raised:
            add(store, "emily", str(folder), "0" * 64)
        assert str(raised.value) == (
            f"{folder} has sha256 {self.digest(folder)} over its 3 files, must be {'0' * 64}; `pascaline models checksum "
            f"{folder}` lists the files; to begin again: pascaline models remove emily"
        )

    def test_a_folder_that_is_not_whole(self, store: Path, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(ModelError, match=r"it has no config\.json"):
            add(store, "emily", str(folder))
        assert find(store, "emily") is None

    def test_what_differs_is_replaced_only_on_request(self, store: Path, folder: Path) -> None:
        add(store, "emily", str(folder))
        (folder / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
        with pytest.raises(ModelError, match="is there already, and differs from"):
            add(store, "emily", str(folder))
        assert add(store, "emily", str(folder), replace=True).path == store / "emily"
        assert read_model(store / "emily").pooling == "mean"

    def test_damage_is_found(self, store: Path, folder: Path) -> None:
        add(store, "emily", str(folder))
        assert [entry.state for entry in verify(store, "emily", self.digest(folder))] == ["verified"] * 3
        (store / "emily/config.json").write_text((folder / "config.json").read_text() + " ")
        assert [entry.state for entry in verify(store, "emily")] == ["verified", "changed", "verified"]
        with pytest.raises(ModelError, match="over its 3 files, must be"):
            verify(store, "emily", self.digest(folder))

    def test_a_folder_is_judged_as_serve_does(self, store: Path, folder: Path) -> None:
        add(store, "emily", str(folder))
        assert problems(verify(store, "emily"), lambda _spec: None) == []
        found = verify(store, "emily")
        (store / "emily/model.safetensors").unlink()
        assert "it has no .safetensors file" in problems(found, lambda _spec: None)[0]


class TestDamagedBeginning:
    """A power cut leaves a partial file that does not hold what was fetched."""

    def leave(self, store: Path, url: str, model: Path) -> None:
        (store / "emily").mkdir(parents=True)
        partial = store / "emily" / f"{model.name}{library.PARTIAL}"
        partial.write_bytes(bytes(1000))
        source = f"{url}/{model.name}"
        answer = httpx.get(source)
        note = {"url": source, "etag": '"one"', "last_modified": answer.headers["last-modified"]}
        partial.with_name(partial.name + ".json").write_text(json.dumps(note | {"size": len(answer.content)}))

    @pytest.mark.parametrize("checksum", [True, False])
    def test_it_is_fetched_anew(self, store: Path, resuming: str, model: Path, digest: str, checksum: bool) -> None:
        self.leave(store, resuming, model)
        added = add(store, "emily", f"{resuming}/{model.name}", digest if checksum else None)
        assert (added.sha256, hashlib.sha256(added.path.read_bytes()).hexdigest()) == (digest, digest)

    def test_only_once(self, store: Path, resuming: str, model: Path, digest: str) -> None:
        self.leave(store, resuming, model)
        with pytest.raises(ModelError) as caught:
            add(store, "emily", f"{resuming}/{model.name}", WRONG)
        assert str(caught.value).startswith(f"{resuming}/{model.name} has sha256 {digest}, must be {WRONG}")
        assert names(store / "emily") == [library.LOCK]


class TestVerify:
    def test_sound_file(self, store: Path, model: Path, digest: str) -> None:
        """The file is read again and is unchanged."""
        add(store, "emily", str(model), digest)
        assert [(e.state, e.sha256) for e in verify(store, "emily")] == [("verified", digest)]

    def test_damage_that_keeps_size_and_time(self, store: Path, model: Path, digest: str) -> None:
        """A rotten bit is seen by reading alone."""
        path = add(store, "emily", str(model), digest).path
        status = path.stat()
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        # The time of change shows the write; nothing shows a bit that rots on the disk.
        assert [entry.state for entry in entries(store)] == ["changed"]
        library._stamp(path, digest)
        assert [entry.state for entry in entries(store)] == ["verified"]
        assert [entry.state for entry in verify(store, "emily")] == ["changed"]

    def test_touched_file_is_believed_again(self, store: Path, model: Path, digest: str) -> None:
        """Another time alone is no damage, once the content was compared."""
        path = add(store, "emily", str(model), digest).path
        os.utime(path, (1, 1))
        assert [entry.state for entry in entries(store)] == ["changed"]
        verify(store, "emily")
        assert [entry.state for entry in entries(store)] == ["verified"]

    def test_checksum_given_later(self, store: Path, model: Path, digest: str) -> None:
        """A file of unknown origin becomes verified when someone vouches for it."""
        add(store, "emily", str(model))
        assert [entry.state for entry in verify(store, "emily")] == ["unverified"]
        assert [entry.state for entry in verify(store, "emily", digest)] == ["verified"]
        assert [entry.state for entry in verify(store, "emily", WRONG)] == ["changed"]

    def test_a_change_of_an_unconfirmed_file_is_reported(self, store: Path, model: Path, digest: str) -> None:
        """Its checksum when it was added is remembered, although nobody confirmed it."""
        path = add(store, "emily", str(model)).path
        assert [(entry.state, entry.sha256) for entry in entries(store)] == [("unverified", digest)]
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        assert [entry.state for entry in entries(store)] == ["changed"]
        assert [entry.state for entry in verify(store, "emily")] == ["changed"]

    def test_a_model_is_found_by_its_name(self, store: Path, model: Path) -> None:
        path = add(store, "emily", str(model)).path
        assert library.find(store, "emily") == path
        assert library.find(store, "emely") is None
        assert library.find(store, "../emily") is None
        (path.with_name("other.gguf")).write_bytes(path.read_bytes())
        with pytest.raises(ModelError, match=r"has several files: other\.gguf, .*; name one by its path$"):
            library.find(store, "emily")

    def test_unknown_model(self, store: Path, model: Path) -> None:
        """The error names what there is."""
        add(store, "emily", str(model))
        with pytest.raises(ModelError) as caught:
            verify(store, "emely")
        assert str(caught.value) == f"no model 'emely' in {store}; there are: emily"


class TestRemove:
    def test_frees_the_bytes(self, store: Path, model: Path, digest: str) -> None:
        """Nothing of the model stays."""
        add(store, "emily", str(model), digest)
        assert remove(store, "emily") >= model.stat().st_size
        assert not (store / "emily").exists()

    def test_not_while_it_is_added(self, store: Path, model: Path) -> None:
        """A model that another process works on is left alone."""
        add(store, "emily", str(model))
        with (store / "emily" / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ModelError) as caught:
                remove(store, "emily")
        assert str(caught.value) == f"{store / 'emily'} is in use by another pascaline models; wait until it ends"


class TestGarbage:
    def test_leftovers(self, store: Path, model: Path, digest: str, tmp_path: Path) -> None:
        """Downloads that did not end, stamps and caches of files that are gone; never a model."""
        path = add(store, "emily", str(model), digest).path
        (store / "emily" / "x.gguf.partial").write_bytes(b"12345")
        (store / "emily" / "gone.gguf.verified").write_text("x")
        (store / "empty").mkdir()
        cache = tmp_path / "cache"
        for name, gguf in (("kept", path), ("old", "/gone.gguf")):
            (cache / "prepared" / name).mkdir(parents=True)
            (cache / "prepared" / name / "pascal.json").write_text(json.dumps({"gguf": str(gguf)}))
        (cache / "checksums").mkdir()
        (cache / "checksums" / "a.json").write_text(json.dumps({"identity": ["/gone.gguf", 1]}))
        found = garbage(store, cache)
        assert [(str(w.path.relative_to(tmp_path)), w.reason) for w in found] == [
            ("models/emily/gone.gguf.verified", "the stamp of a file that is gone"),
            ("models/emily/x.gguf.partial", "a download that did not end"),
            ("models/empty", "holds no model"),
            ("cache/prepared/old", "prepared from a file that is gone"),
            ("cache/checksums/a.json", "checksum of a file that is gone"),
        ]
        for waste in found:
            library.delete(waste)
        assert garbage(store, cache) == []
        assert path.exists()

    def test_models_that_are_not_kept(self, store: Path, model: Path, tmp_path: Path) -> None:
        """With a list of names all others go; a folder that the library did not make stays."""
        add(store, "emily", str(model))
        add(store, "old", str(model))
        (store / "thesis").mkdir()
        (store / "thesis" / "chapter.txt").write_text("years of work")
        found = garbage(store, tmp_path, frozenset({"emily"}))
        assert [(w.path, w.reason) for w in found] == [(store / "old", "not among the models to keep")]

    def test_what_is_being_added_is_left_alone(self, store: Path, tmp_path: Path) -> None:
        """A partial file that another process writes is no garbage."""
        (store / "emily").mkdir(parents=True)
        (store / "emily" / "x.gguf.partial").write_bytes(b"12345")
        with (store / "emily" / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert garbage(store, tmp_path) == []


class TestCommand:
    def run(self, store: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | ({"XDG_CACHE_HOME": str(store.parent / "cache")} if store else {})
        place = ("--store", str(store)) if store else ()
        return subprocess.run(
            [sys.executable, "-m", "pascaline", "models", *arguments, *place],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=False,
        )

    def test_life_of_a_model(self, store: Path, model: Path, digest: str) -> None:
        """Add, list, verify, gc and remove, as a person would."""
        path = store / "emily" / model.name
        added = self.run(store, "add", "emily", str(model))
        assert (added.returncode, added.stdout) == (0, f"{path}: is in place, sha256 {digest}\n")
        assert added.stderr.splitlines()[-1] == (
            "pascaline models: no checksum was given, so nothing proves that this is the right file; compare the "
            f"sha256 with another source, then run: pascaline models verify emily --sha256 {digest} --store {store}"
        )
        assert self.run(store, "verify", "emily", "--sha256", digest).returncode == 0
        listed = json.loads(self.run(store, "list", "--json").stdout)
        assert listed == [
            {"name": "emily", "path": str(path), "bytes": path.stat().st_size, "state": "verified", "sha256": digest}
        ]
        assert self.run(store, "gc").stdout == "0 B freed\n"
        assert self.run(store, "remove", "emily").returncode == 0
        assert self.run(store, "list").stdout == f"no models in {store}\n"

    def test_damaged_model(self, store: Path, model: Path, digest: str) -> None:
        """`verify` ends with the code of model errors and names the file."""
        path = add(store, "emily", str(model), digest).path
        path.write_bytes(b"x")
        done = self.run(store, "verify")
        assert done.returncode == 3
        found = hashlib.sha256(b"x").hexdigest()
        assert done.stderr.splitlines()[-1] == (
            f"pascaline models: {path} has sha256 {found}, must be {digest}; bring the file again: "
            "pascaline models remove emily, then add it"
        )

    def test_a_model_that_no_engine_serves(self, store: Path, tmp_path: Path) -> None:
        """`verify` judges a file as serve does: the checksum says only that it is the one that came."""
        path = write_gguf(tmp_path / "m.gguf", tiny("llama"), "Q8_0", metadata={"llama.rope.scaling.type": "su"})
        added = add(store, "emily", str(path), hashlib.sha256(path.read_bytes()).hexdigest()).path
        done = self.run(store, "verify")
        assert done.returncode == 3
        assert done.stderr.splitlines()[-1].startswith(
            f'pascaline models: {added}: engine sglang cannot serve it: "llama.rope.scaling.type" is "su", which is not'
        )

    def test_checksum_of_each_kind_of_model(self, store: Path, model: Path, digest: str, tmp_path: Path) -> None:
        """What model_sha256 takes is on standard output, the list of a folder's files on standard error."""
        assert self.run(None, "checksum", str(model)).stdout == f"{digest}\n"
        folder = write_folder(tmp_path / "folder", tiny("llama"))
        done = self.run(None, "checksum", str(folder))
        lines = [line for line in done.stderr.splitlines(keepends=True) if re.match("[0-9a-f]{64}  ", line)]
        assert hashlib.sha256("".join(lines).encode()).hexdigest() == done.stdout.strip()
        parts = split_gguf(Path(shutil.copy(model, tmp_path)), 2)
        both = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
        found = json.loads(self.run(None, "checksum", str(parts[1]), "--json").stdout)
        assert (found["sha256"], list(found["files"])) == (",".join(both), [part.name for part in parts])

    def test_dry_run_deletes_nothing(self, store: Path, model: Path) -> None:
        """gc can show what it would do."""
        add(store, "old", str(model))
        done = self.run(store, "gc", "--dry-run", "--keep", "emily")
        assert done.stdout.splitlines()[-1].endswith(" would be freed")
        assert (store / "old" / model.name).exists()
