"""The library of model files: one folder per model, as the NixOS module keeps it, each file checked against a sha256.

STORE/NAME/FILE            the file, complete or absent
STORE/NAME/FILE.verified   `SHA256 SIZE CHANGED INODE` of the file when its checksum equalled the one that a person gave
STORE/NAME/FILE.seen       the same for a file that was added without a checksum, so that a later change is seen
STORE/NAME/FILE.partial    an unfinished download (download.py)
STORE/NAME/.lock           held while a process adds, verifies or removes

A split model has several such files, its parts, which are added and verified together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from gguf_acceptance import file_sha256

from pascaline import file_locks
from pascaline.digests import parse_sha256s, shown_sha256s
from pascaline.errors import ConfigurationError, ModelError, NotFetchedError, StorageError
from pascaline.models.download import CHUNK_BYTES, Download, OnBytes, full_disk, storage_error
from pascaline.models.folder_files import SUBFOLDERS, folder_files, folder_sha256, is_model_folder
from pascaline.models.gguf import open_gguf
from pascaline.models.gguf_split import sibling_names
from pascaline.models.reader import read_model
from pascaline.models.server_words import shown_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pascaline.models.spec import ModelSpec

SYSTEM_STORE = Path("/var/lib/pascaline/models")
"""Where the NixOS module keeps models (services.pascaline.stateDir)."""
LOCK = ".lock"
PARTIAL, VERIFIED, SEEN = ".partial", ".verified", ".seen"

State = Literal["verified", "unverified", "changed", "partial"]
"""verified: as it was when its checksum was compared; unverified: as it was when it was added, without a checksum;
changed: written or replaced since; partial: a download that did not end."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the library."""

    name: str
    path: Path
    bytes: int
    state: State
    sha256: str | None
    """Checksum of the last comparison; None if there was none."""
    expected: str | None = None
    """Checksum that it was compared with by `verify`; None if there was none."""


def unwatched(_done: int, _total: int | None) -> None:
    """Report bytes to nobody."""


@dataclass(frozen=True, slots=True)
class Added:
    """Result of `add`."""

    path: Path
    """The file, the first part of a split model, or the folder."""
    sha256: str
    """Checksum of the file or the folder; for a split model those of its parts in order, separated by commas."""
    was_there: bool
    verified: bool
    """Whether a checksum was given for each file, and each file has it."""


def default_store() -> Path:
    """Return the host's library if it exists, else the user's own."""
    if SYSTEM_STORE.is_dir():
        return SYSTEM_STORE
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "pascaline" / "models"


Refusal = Callable[["ModelSpec"], str | None]
"""Says why no engine serves a model; None if one does."""
OnPart = Callable[[int, int], OnBytes]
"""Called with (index of the next part, number of parts); returns the function that is called with its bytes."""


def add(
    store: Path,
    name: str,
    source: str,
    sha256: str | Sequence[str] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    on_bytes: OnBytes = unwatched,
    on_part: OnPart | None = None,
    target: Path | None = None,
    replace: bool = False,
) -> Added:
    """Bring a model, with all parts of a split one, into the library from a URL or a path. Return where it is.

    source: the file, or any part of a split model; the other parts are taken from beside it. Or the path of a folder.
    target: where the file, or that part, goes instead of the model's folder. replace: bring a file again if the one
    that is there has another checksum than it must have, which is an error otherwise.
    sha256: the checksum of each file, from a source other than the server. Without it they count as unverified.
    headers: of the requests, for a server that asks for a token. on_part: replaces on_bytes; one function per part.
    """
    digests = _check_arguments(name, sha256)
    source = _without_file_scheme(source)
    if not _is_url(source) and Path(source).is_dir():
        return _add_folder(store, name, Path(source), digests, on_bytes, target=target, replace=replace)
    file_name = _file_name(source)
    folder, target_name = (target.parent, target.name) if target else (store / name, file_name)
    names, places = (sibling_names(each) or [each] for each in (file_name, target_name))
    _require_one_each(digests, names)
    if len(names) != len(places):
        raise ConfigurationError(f"--target: {target_name} must end as {file_name} does, whose parts it names")
    with _locked(folder, wait=True):
        added = [
            _add_file(
                _beside(source, file_name, part),
                folder / places[index],
                digests[index] if digests else None,
                replace=replace,
                headers=headers,
                on_bytes=on_part(index, len(names)) if on_part else on_bytes,
            )
            for index, part in enumerate(names)
        ]
        if len(names) > 1:
            _require_one_model(folder / places[0])
    return Added(
        added[0].path,
        ",".join(each.sha256 for each in added),
        was_there=all(each.was_there for each in added),
        verified=all(each.verified for each in added),
    )


def _add_folder(
    store: Path,
    name: str,
    source: Path,
    digests: tuple[str, ...] | None,
    on_bytes: OnBytes,
    *,
    target: Path | None,
    replace: bool,
) -> Added:
    """Copy the files of a Hugging Face folder that decide what is served, and read the model that they make."""
    read_model(source)
    folder, names = target or store / name, folder_files(source)
    with _locked(folder, wait=True):
        added = [_place(source / each, folder / each, on_bytes, replace=replace) for each in names]
        found = folder_sha256(names, [each.sha256 for each in added])
        if digests not in (None, (found,)):
            raise ModelError(f"{_of_folder(source, found, names, digests or ())}; {_begin_again(name)}")
        if further := set(folder_files(folder)) - set(names):
            raise ModelError(f"{folder} holds {min(further)} too, which {source} does not have; {_begin_again(name)}")
        for each in added:
            _stamp(each.path, each.sha256, SEEN if digests is None else VERIFIED)
    return Added(folder, found, all(each.was_there for each in added), digests is not None)


def _place(source: Path, target: Path, on_bytes: OnBytes, *, replace: bool) -> Added:
    """Copy a file of a folder, unless it is there."""
    if target.exists():
        digest = file_sha256(target)
        if digest == file_sha256(source):
            return Added(target, digest, was_there=True, verified=False)
        if not replace:
            raise ModelError(
                f"{target} is there already, and differs from {source}; {_begin_again(target.parent.name)}"
            )
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    digest = _copy(source, partial, on_bytes)
    partial.replace(target)
    _sync(target.parent)
    return Added(target, digest, was_there=False, verified=False)


def _of_folder(folder: Path, found: str, names: Sequence[str], expected: Sequence[str]) -> str:
    return (
        f"{folder} has sha256 {found} over its {len(names)} files, must be {shown_sha256s(expected)}; "
        f"`pascaline models checksum {folder}` lists the files"
    )


def _begin_again(name: str) -> str:
    return f"to begin again: pascaline models remove {name}"


def _add_file(
    source: str,
    target: Path,
    sha256: str | None,
    *,
    replace: bool,
    headers: Mapping[str, str] | None,
    on_bytes: OnBytes,
) -> Added:
    if target.exists() and (found := _in_place(target, sha256, on_bytes, replace=replace)) is not None:
        return found
    partial = target.with_name(target.name + PARTIAL)
    digest = _bring(source, partial, target, sha256, headers, on_bytes)
    _require_digest(partial, shown_url(source) if _is_url(source) else source, digest, sha256)
    if sha256 is None:
        _require_header(partial, target)
    partial.replace(target)
    _sync(target.parent)
    _stamp(target, digest, SEEN if sha256 is None else VERIFIED)
    return Added(target, digest, was_there=False, verified=sha256 is not None)


def _bring(
    source: str,
    partial: Path,
    target: Path,
    sha256: str | None,
    headers: Mapping[str, str] | None,
    on_bytes: OnBytes,
) -> str:
    """Fetch or copy a file and return its sha256; fetch it again if it was resumed from a damaged beginning."""
    if not _is_url(source):
        return _copy(Path(source), partial, on_bytes)
    download = Download(source, partial, headers=headers, on_bytes=on_bytes)
    digest = download.fetch()
    wrong = sha256 != digest if sha256 is not None else _header_problem(partial, target) is not None
    if download.resumed and wrong:
        partial.unlink()
        digest = Download(source, partial, headers=headers, on_bytes=on_bytes).fetch()
    return digest


def _beside(source: str, name: str, part: str) -> str:
    """Return the place of a part of this name beside the one that was named."""
    if name == part:
        return source
    if not _is_url(source):
        return str(Path(source).with_name(part))
    parts = urlsplit(source)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(part)}"))


def _check_arguments(name: str, sha256: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"name: invalid value {name!r}, must be letters, digits, '.', '_' and '-'")
    try:
        return parse_sha256s(sha256)
    except ValueError as error:
        raise ConfigurationError(f"--sha256: {error}") from error


def _require_one_each(digests: tuple[str, ...] | None, names: Sequence[str]) -> None:
    """Refuse the checksum of one part for the whole of a split model."""
    if digests is not None and len(digests) != len(names):
        raise ConfigurationError(
            f"--sha256: {len(digests)} given, and each covers one file alone; must be {len(names)}, for: "
            f"{', '.join(names)}"
        )


def _require_one_model(first: Path) -> None:
    try:
        read_model(first)
    except ModelError as error:
        raise ModelError(f"{error}; {_begin_again(first.parent.name)}") from error


def _without_file_scheme(source: str) -> str:
    """Return the path of a URL such as file:///data/emily.gguf; anything else as it is."""
    return unquote(urlsplit(source).path) if source.startswith("file://") else source


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _file_name(source: str) -> str:
    """Return the last part of a URL's or path's name, if it can be a file of a library."""
    name = unquote(urlsplit(source).path.rpartition("/")[2]) if _is_url(source) else Path(source).name
    if not name or name.startswith(".") or "/" in name or "\0" in name or name.endswith((PARTIAL, VERIFIED, SEEN)):
        raise ConfigurationError(f"source: {shown_url(source) if _is_url(source) else source!r} names no file")
    return name


def _in_place(target: Path, sha256: str | None, on_bytes: OnBytes, *, replace: bool) -> Added | None:
    """Return the file that is there; None if it is to be replaced."""
    known = _stamped(target)
    digest = known if known is not None else file_sha256(target, on_bytes)
    if sha256 not in (None, digest):
        if replace:
            return None
        raise ModelError(
            f"{target} is there already and has sha256 {digest}, must be {sha256}; "
            f"to replace it: pascaline models remove {target.parent.name}"
        )
    if sha256 is not None:
        _stamp(target, digest)
    return Added(target, digest, was_there=True, verified=sha256 is not None or known is not None)


def _copy(source: Path, partial: Path, on_bytes: OnBytes) -> str:
    try:
        total = source.stat().st_size
        reader = source.open("rb")
    except OSError as error:
        raise NotFetchedError(f"failed to read {source}: {error.strerror}") from error
    free = shutil.disk_usage(partial.parent).free
    if free < total:
        reader.close()
        raise full_disk(partial.parent, free, total)
    digest, done = hashlib.sha256(), 0
    with reader:
        try:
            with new_file(partial) as writer:
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
    """Refuse a file that cannot be a model: servers answer 200 with a login page. A checksum vouches for more."""
    if (problem := _header_problem(partial, target)) is not None:
        partial.unlink()
        raise ModelError(f"{problem}; the file was deleted")


def _header_problem(partial: Path, target: Path) -> str | None:
    if target.suffix != ".gguf":
        return None
    try:
        if sibling_names(target.name) is None:
            read_model(partial)
        else:
            # A part, which is a model only together with the others.
            with open_gguf(partial):
                pass
    except ModelError as error:
        return str(error)
    return None


def entries(store: Path) -> list[Entry]:
    """Return all files of the library, by name."""
    folders = sorted(folder for folder in store.iterdir() if folder.is_dir()) if store.is_dir() else []
    return [_entry(folder.name, file) for folder in folders for file in sorted(_files(folder))]


def _files(folder: Path) -> Iterator[Path]:
    for file in folder.iterdir():
        if file.is_file() and file.name != LOCK and not file.name.endswith((VERIFIED, SEEN, PARTIAL + ".json")):
            yield file


def _entry(name: str, file: Path) -> Entry:
    size = file.stat().st_size
    if file.name.endswith(PARTIAL):
        return Entry(name, file, size, "partial", None)
    text, state = _read_stamp(file), "verified"
    if text is None:
        text, state = _read_stamp(file, SEEN), "unverified"
    if text is None:
        return Entry(name, file, size, "unverified", None)
    digest = text.partition(" ")[0]
    return Entry(name, file, size, cast("State", state) if text == _stamp_text(file, digest) else "changed", digest)


def find(store: Path, name: str) -> Path | None:
    """Return the file of a model in the library, its first part or its folder; None if the library lacks the model.

    Raises ModelError if the folder holds several models.
    """
    if not _NAME.fullmatch(name) or not (store / name).is_dir():
        return None
    if is_model_folder(store / name):
        return store / name
    files = [file for file in sorted(_files(store / name)) if not file.name.endswith(PARTIAL)]
    first = {(sibling_names(file.name) or [file.name])[0] for file in files}
    if len(first) > 1:
        raise ModelError(
            f"model {name!r} of {store} has several files: {', '.join(sorted(first))}; name one by its path"
        )
    return store / name / first.pop() if first else None


def problems(found: Sequence[Entry], refusal: Refusal) -> list[str]:
    """Return why no engine here serves these files: damaged, a missing part, or a part of another model.

    Files with another checksum are not judged further. A split model is judged once.
    """
    changed = {entry.path.parent for entry in found if entry.state == "changed"}
    folders = {entry.path.parent for entry in found if entry.path.parent.name not in SUBFOLDERS} - changed
    models = {folder: folder for folder in sorted(folders) if is_model_folder(folder)}
    for entry in found:
        if entry.path.suffix == ".gguf" and entry.state != "changed":
            names = sibling_names(entry.path.name) or [entry.path.name]
            models.setdefault(entry.path.with_name(names[0]), entry.path)
    return [problem for file in models.values() if (problem := _problem(file, refusal)) is not None]


def _problem(file: Path, refusal: Refusal) -> str | None:
    try:
        spec = read_model(file)
    except ModelError as error:
        return str(error)
    sentence = refusal(spec)
    return f"{file}: {sentence}" if sentence else None


def verify(
    store: Path,
    name: str,
    sha256: str | Sequence[str] | None = None,
    on_bytes: OnBytes = lambda _d, _t: None,
) -> list[Entry]:
    """Read every file of a model again, and return its state: `changed` if the checksum differs.

    sha256: compare with it and, if it is equal, remember it; one for each file, in the order of their names, or the one
    of a whole folder (folder_files.py).
    """
    digests = _check_arguments(name, sha256)
    folder = _existing(store, name)
    with _locked(folder, wait=True):
        if is_model_folder(folder):
            return _verify_folder(name, folder, digests, on_bytes)
        files = [file for file in sorted(_files(folder)) if not file.name.endswith(PARTIAL)]
        _require_one_each(digests, [file.name for file in files])
        expected = digests or (None,) * len(files)
        return [_verify(name, file, digest, on_bytes) for file, digest in zip(files, expected, strict=True)]


def _verify(name: str, file: Path, sha256: str | None, on_bytes: OnBytes) -> Entry:
    text = _read_stamp(file)
    vouched = sha256 or (text.partition(" ")[0] if text else None)
    seen = _read_stamp(file, SEEN)
    expected = vouched or (seen.partition(" ")[0] if seen else None)
    digest = file_sha256(file, on_bytes)
    if expected in (None, digest):
        _stamp(file, digest, VERIFIED if vouched else SEEN)
    state: State = "changed" if expected not in (None, digest) else "verified" if vouched else "unverified"
    return Entry(name, file, file.stat().st_size, state, digest, expected)


def _verify_folder(name: str, folder: Path, expected: tuple[str, ...] | None, on_bytes: OnBytes) -> list[Entry]:
    names = folder_files(folder)
    found = [_verify(name, folder / each, None, on_bytes) for each in names]
    if expected is None:
        return found
    digest = folder_sha256(names, [entry.sha256 or "" for entry in found])
    if expected != (digest,):
        raise ModelError(_of_folder(folder, digest, names, expected))
    for entry in found:
        _stamp(entry.path, entry.sha256 or "")
    return [Entry(name, entry.path, entry.bytes, "verified", entry.sha256) for entry in found]


def remove(store: Path, name: str) -> int:
    """Delete a model and return the bytes that this gave back; a process that has it open keeps its copy."""
    folder = _existing(store, name)
    if folder.is_symlink():
        raise ModelError(
            f"{folder} is a link to {folder.readlink()}, which is not deleted; to remove the link: rm {folder}"
        )
    with _locked(folder, wait=False):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        shutil.rmtree(folder)
    return size


def new_file(path: Path) -> BinaryIO:
    """Open a file that takes the place of whatever has this name. What a symbolic link points to is left as it is."""
    path.unlink(missing_ok=True)
    return path.open("xb")


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that can be deleted."""

    path: Path
    bytes: int
    reason: str


def garbage(store: Path, cache: Path, keep: frozenset[str] | None = None) -> list[Garbage]:
    """Return what can be deleted: unfinished downloads, stamps and caches of files that no longer exist.

    keep: names of the models that are still wanted; None: all. Files that another process holds are left out.
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
    is_ours = any(name == LOCK or name.endswith((VERIFIED, SEEN, PARTIAL)) for name in names)
    if keep is not None and folder.name not in keep:
        return [_waste(folder, "not among the models to keep")] if is_ours else []
    found = []
    for name in sorted(names):
        path = folder / name
        if name.endswith((PARTIAL, PARTIAL + ".json")):
            found.append(_waste(path, "a download that did not end"))
        elif name.endswith((VERIFIED, SEEN)) and name.rpartition(".")[0] not in names:
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
        is_folder = waste.path.is_dir() and not waste.path.is_symlink()
        shutil.rmtree(waste.path) if is_folder else waste.path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"failed to delete {waste.path}: {error.strerror}") from error


def _existing(store: Path, name: str) -> Path:
    folder = store / name
    if not _NAME.fullmatch(name) or not folder.is_dir():
        known = ", ".join(sorted({entry.name for entry in entries(store)})) or "none"
        raise ModelError(f"no model {name!r} in {store}; there are: {known}")
    return folder


def _stamp_text(file: Path, digest: str) -> str:
    """Digest, size, time of change and inode. The kernel sets that time at each write; no program can set it back."""
    status = file.stat()
    seconds, rest = divmod(status.st_ctime_ns, 10**9)
    return f"{digest} {status.st_size} {seconds}.{rest:09d} {status.st_ino}"


def _stamp(file: Path, digest: str, kind: str = VERIFIED) -> None:
    """Remember a digest; a verified file needs no record of its first state."""
    try:
        with new_file(file.with_name(file.name + kind)) as stamp:
            stamp.write(_stamp_text(file, digest).encode())
        if kind == VERIFIED:
            file.with_name(file.name + SEEN).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, file.parent, None) from error


def _read_stamp(file: Path, kind: str = VERIFIED) -> str | None:
    try:
        return file.with_name(file.name + kind).read_text().strip()
    except OSError:
        return None


def _stamped(file: Path) -> str | None:
    """Return the digest of a stamp that is still valid."""
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
    """Hold a model's lock. Raises StorageError if it cannot be written, ModelError if another process holds it."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_locks.locked(folder / LOCK, wait=wait))
        except BlockingIOError as error:
            raise ModelError(f"{folder} is in use by another pascaline models; wait until it ends") from error
        except OSError as error:
            raise StorageError(
                f"failed to write to {folder}: {error.strerror}; name a folder of this user with --store"
            ) from error
        yield


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as file:
            return file_locks.is_held(file)
    except OSError:
        return False
