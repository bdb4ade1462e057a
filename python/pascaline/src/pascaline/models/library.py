"""The library of model files: one folder a model, as the NixOS module keeps it, each file verified against a sha256.

STORE/NAME/FILE            the file, which is there whole or not at all
STORE/NAME/FILE.verified   `SHA256 SIZE MTIME` of the file when its checksum was compared with one that a person gave
STORE/NAME/FILE.partial    a download on its way (download.py)
STORE/NAME/.lock           held while a process adds, verifies or removes
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from pascaline.errors import ConfigurationError, ModelError, StorageError
from pascaline.models.download import CHUNK_BYTES, Download, OnBytes, full_disk, shown_url, storage_error
from pascaline.models.reader import read_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SYSTEM_STORE = Path("/var/lib/pascaline/models")
"""Where the NixOS module keeps models (services.pascaline.stateDir)."""
LOCK = ".lock"
PARTIAL, VERIFIED = ".partial", ".verified"

State = Literal["verified", "unverified", "changed", "partial"]
"""verified: as it was when its checksum was compared; unverified: never compared; changed: another size or time since;
partial: a download that did not end."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the library."""

    name: str
    path: Path
    bytes: int
    state: State
    sha256: str | None
    """Of the last comparison; None where there was none."""


@dataclass(frozen=True, slots=True)
class Added:
    """What `add` did."""

    path: Path
    sha256: str
    was_there: bool
    verified: bool
    """Whether a checksum was given, which it has."""


def default_store() -> Path:
    """Return the host's library where it exists, else the user's own."""
    if SYSTEM_STORE.is_dir():
        return SYSTEM_STORE
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "pascaline" / "models"


def add(
    store: Path,
    name: str,
    source: str,
    sha256: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    on_bytes: OnBytes = lambda _done, _total: None,
) -> Added:
    """Bring a file into the library from a URL or a path, and return where it is.

    sha256: what it must have, from a source other than the server. Without it the file counts as unverified.
    headers: of the requests, for a server that asks for a token.
    """
    _check_arguments(name, sha256)
    folder = store / name
    target = folder / _file_name(source)
    with _locked(folder, wait=True):
        if target.exists():
            return _in_place(target, sha256, on_bytes)
        partial = target.with_name(target.name + PARTIAL)
        if _is_url(source):
            digest = Download(source, partial, headers=headers, on_bytes=on_bytes).fetch()
        else:
            digest = _copy(Path(source), partial, on_bytes)
        _require_digest(partial, shown_url(source) if _is_url(source) else source, digest, sha256)
        _require_header(partial, target)
        partial.replace(target)
        _sync(folder)
        if sha256 is not None:
            _stamp(target, digest)
        return Added(target, digest, was_there=False, verified=sha256 is not None)


def _check_arguments(name: str, sha256: str | None) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"name: invalid value {name!r}, must be letters, digits, '.', '_' and '-'")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigurationError(
            f"--sha256: invalid value {sha256!r}, must be 64 hexadecimal digits in lower case, as sha256sum prints them"
        )


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _file_name(source: str) -> str:
    """Return the last part of a URL's or path's name, if it can be a file of a library."""
    name = unquote(urlsplit(source).path.rpartition("/")[2]) if _is_url(source) else Path(source).name
    if not name or name.startswith(".") or "/" in name or "\0" in name or name.endswith((PARTIAL, VERIFIED)):
        raise ConfigurationError(f"source: {shown_url(source) if _is_url(source) else source!r} names no file")
    return name


def _in_place(target: Path, sha256: str | None, on_bytes: OnBytes) -> Added:
    known = _stamped(target)
    digest = known if known is not None else file_sha256(target, on_bytes)
    if sha256 not in (None, digest):
        raise ModelError(
            f"{target} is there already and has sha256 {digest}, must be {sha256}; "
            f"if it is to be replaced: pascaline models remove {target.parent.name}"
        )
    if sha256 is not None:
        _stamp(target, digest)
    return Added(target, digest, was_there=True, verified=sha256 is not None or known is not None)


def _copy(source: Path, partial: Path, on_bytes: OnBytes) -> str:
    try:
        total = source.stat().st_size
        reader = source.open("rb")
    except OSError as error:
        raise ModelError(f"failed to read {source}: {error.strerror}") from error
    free = shutil.disk_usage(partial.parent).free
    if free < total:
        reader.close()
        raise full_disk(partial.parent, free, total)
    digest, done = hashlib.sha256(), 0
    with reader:
        try:
            with partial.open("wb") as writer:
                while chunk := reader.read(CHUNK_BYTES):
                    writer.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    on_bytes(done, total)
                writer.flush()
                os.fsync(writer.fileno())
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise storage_error(error, partial.parent, total) from error
    return digest.hexdigest()


def _require_digest(partial: Path, source: str, digest: str, sha256: str | None) -> None:
    if sha256 not in (None, digest):
        partial.unlink()
        raise ModelError(
            f"{source} has sha256 {digest}, must be {sha256}; the file was deleted: correct --sha256, or the source"
        )


def _require_header(partial: Path, target: Path) -> None:
    """Refuse what cannot be a model: servers answer 200 with a page that asks to log in."""
    if target.suffix != ".gguf" or re.search(r"-\d{5}-of-\d{5}$", target.stem):
        return
    try:
        read_model(partial)
    except ModelError as error:
        partial.unlink()
        raise ModelError(f"{error}; the file was deleted") from error


def entries(store: Path) -> list[Entry]:
    """Return all files of the library, by name."""
    folders = sorted(folder for folder in store.iterdir() if folder.is_dir()) if store.is_dir() else []
    return [_entry(folder.name, file) for folder in folders for file in sorted(_files(folder))]


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.iterdir():
        if file.is_file() and file.name != LOCK and not file.name.endswith((VERIFIED, PARTIAL + ".json")):
            yield file


def _entry(name: str, file: Path) -> Entry:
    size = file.stat().st_size
    if file.name.endswith(PARTIAL):
        return Entry(name, file, size, "partial", None)
    text = _read_stamp(file)
    if text is None:
        return Entry(name, file, size, "unverified", None)
    digest = text.partition(" ")[0]
    return Entry(name, file, size, "verified" if text == _stamp_text(file, digest) else "changed", digest)


def verify(store: Path, name: str, sha256: str | None = None, on_bytes: OnBytes = lambda _d, _t: None) -> list[Entry]:
    """Read every file of a model again, and return them as they are: `changed` where the checksum is another.

    sha256: compare with it and, where it fits, remember it; for a model of one file.
    """
    _check_arguments(name, sha256)
    folder = _existing(store, name)
    with _locked(folder, wait=True):
        files = [file for file in sorted(_files(folder)) if not file.name.endswith(PARTIAL)]
        if sha256 is not None and len(files) != 1:
            raise ConfigurationError(f"--sha256: {name} has {len(files)} files, must be one")
        return [_verify(name, file, sha256, on_bytes) for file in files]


def _verify(name: str, file: Path, sha256: str | None, on_bytes: OnBytes) -> Entry:
    text = _read_stamp(file)
    expected = sha256 or (text.partition(" ")[0] if text else None)
    digest = file_sha256(file, on_bytes)
    if expected == digest:
        _stamp(file, digest)
    state: State = "unverified" if expected is None else "verified" if expected == digest else "changed"
    return Entry(name, file, file.stat().st_size, state, digest)


def remove(store: Path, name: str) -> int:
    """Delete a model and return the bytes that this gave back; a process that has it open keeps its copy."""
    folder = _existing(store, name)
    with _locked(folder, wait=False):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    return size


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that nothing needs."""

    path: Path
    bytes: int
    reason: str


def garbage(store: Path, cache: Path, keep: frozenset[str] | None = None) -> list[Garbage]:
    """Return what can be deleted: downloads that did not end, stamps and caches of files that are gone.

    keep: names of the models that are still wanted; None: all. What another process holds is left out.
    """
    found = []
    for folder in sorted(store.iterdir()) if store.is_dir() else []:
        if folder.is_dir() and not _is_locked(folder):
            found += _garbage_of(folder, keep)
    for manifest in sorted(cache.glob("prepared/*/pascal.json")):
        if not Path(_json(manifest).get("gguf", "")).exists():
            found.append(_waste(manifest.parent, "prepared from a file that is gone"))
    for note in sorted(cache.glob("checksums/*.json")):
        identity = _json(note).get("identity") or [""]
        if not Path(identity[0]).exists():
            found.append(_waste(note, "checksum of a file that is gone"))
    return found


def _garbage_of(folder: Path, keep: frozenset[str] | None) -> list[Garbage]:
    names = {file.name for file in folder.iterdir()}
    # A folder without any of these is not the library's: --store may name a place that holds other things too.
    is_ours = any(name == LOCK or name.endswith((VERIFIED, PARTIAL)) for name in names)
    if keep is not None and folder.name not in keep:
        return [_waste(folder, "not among the models to keep")] if is_ours else []
    found = []
    for name in sorted(names):
        path = folder / name
        if name.endswith((PARTIAL, PARTIAL + ".json")):
            found.append(_waste(path, "a download that did not end"))
        elif name.endswith(VERIFIED) and name.removesuffix(VERIFIED) not in names:
            found.append(_waste(path, "the stamp of a file that is gone"))
    if names <= {LOCK} | {waste.path.name for waste in found}:
        return [_waste(folder, "holds no model")]
    return found


def _waste(path: Path, reason: str) -> Garbage:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Garbage(path, sum(file.stat().st_size for file in files), reason)


def delete(waste: Garbage) -> None:
    """Delete one piece of garbage."""
    try:
        shutil.rmtree(waste.path) if waste.path.is_dir() else waste.path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"failed to delete {waste.path}: {error.strerror}") from error


def file_sha256(path: Path, on_bytes: OnBytes = lambda _done, _total: None) -> str:
    """Return the sha256 of a file, read now."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_bytes(done, total)
    return digest.hexdigest()


def _existing(store: Path, name: str) -> Path:
    folder = store / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        known = ", ".join(sorted({entry.name for entry in entries(store)})) or "none"
        raise ModelError(f"no model {name!r} in {store}; there are: {known}")
    return folder


def _stamp_text(file: Path, digest: str) -> str:
    """As modules/fetch-model.sh writes it, so that each accepts the other's."""
    status = file.stat()
    return f"{digest} {status.st_size} {int(status.st_mtime)}"


def _stamp(file: Path, digest: str) -> None:
    stamp = file.with_name(file.name + VERIFIED)
    try:
        stamp.write_text(_stamp_text(file, digest))
    except OSError as error:
        raise storage_error(error, file.parent, None) from error


def _read_stamp(file: Path) -> str | None:
    try:
        return file.with_name(file.name + VERIFIED).read_text().strip()
    except OSError:
        return None


def _stamped(file: Path) -> str | None:
    """Return the digest of a stamp that still holds."""
    text = _read_stamp(file)
    digest = text.partition(" ")[0] if text else ""
    return digest if text and text == _stamp_text(file, digest) else None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a model's lock; StorageError where it may not be written, ModelError where another holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise StorageError(
            f"failed to write to {folder}: {error.strerror}; name a folder of this user with --store"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ModelError(f"{folder} is in use by another pascaline models; wait for its end") from error
        yield


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
