"""`pascaline models`: the library of model files on this host."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.cli.options import add_token_argument, token_headers
from pascaline.errors import ConfigurationError, ExitCode
from pascaline.text_table import LEFT, RIGHT, table_lines
from pascaline.units import format_bytes

if TYPE_CHECKING:
    import argparse

    from pascaline.models.library import Entry

DESCRIPTION = """Download, verify, list and delete model files.

  pascaline models add emily https://models.example.org/emily.Q4_K_M.gguf --sha256 2f3c…
  pascaline models add emily /data/emily.Q4_K_M.gguf --sha256 2f3c…
  pascaline models list
  pascaline models verify [NAME]             read the files again, compare their checksums, and check them as serve does
  pascaline models remove NAME
  pascaline models checksum PATH             print what model_sha256 and --sha256 take: of a file, its parts or a folder
  pascaline models gc [--keep NAME …]        delete what nothing needs; --dry-run only shows it

Each model is a folder of the library: /var/lib/pascaline/models if that exists (the NixOS module creates it), otherwise
~/.local/share/pascaline/models. An interrupted download continues if the server proves that its file is unchanged. Take
the --sha256 from another source than the server: whoever can replace the file can also replace its checksum. For a
split model (NAME-00001-of-0000N.gguf) name any part: `add` brings all parts, and --sha256 takes one checksum for each,
in order, separated by commas. FILE may be a Hugging Face folder; its one checksum covers every file that decides what
is served. `serve --model` and `plan` accept NAME."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one parser per action."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="copy or download a file into the library")
    add.add_argument("name", metavar="NAME", help="name of the model")
    add.add_argument("source", metavar="URL|FILE", help="where the file comes from")
    add.add_argument("--sha256", metavar="HEX[,HEX…]", help="checksum that it must have; one for each part")
    add.add_argument("--target", type=Path, metavar="FILE", help="where the file goes (default: the model's folder)")
    add.add_argument(
        "--replace", action="store_true", help="bring a file again that is there with another checksum than --sha256"
    )
    add_token_argument(add)
    listing = actions.add_parser("list", help="show what is in the library")
    verify = actions.add_parser("verify", help="read files again and compare their checksums")
    verify.add_argument("names", nargs="*", metavar="NAME", help="models (default: all)")
    verify.add_argument(
        "--sha256", metavar="HEX[,HEX…]", help="expected checksum of each file, in order; stored if it matches"
    )
    checksum = actions.add_parser("checksum", help="print the checksum of a model that is anywhere on this host")
    checksum.add_argument("path", type=Path, metavar="PATH", help="GGUF file, any part of a split model, or a folder")
    checksum.add_argument("--json", action="store_true", help="also the checksum of each file")
    remove = actions.add_parser("remove", help="delete a model")
    remove.add_argument("name", metavar="NAME", help="name of the model")
    collect = actions.add_parser("gc", help="delete what nothing needs")
    collect.add_argument("--keep", nargs="+", metavar="NAME", help="models to keep; all others are deleted")
    collect.add_argument("--dry-run", action="store_true", help="only show what would be deleted")
    for action in (add, listing, verify, remove, collect):
        action.add_argument("--store", type=Path, metavar="DIR", help="folder of the library")
        action.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    """Run the action."""
    from pascaline.models.library import default_store

    store = getattr(arguments, "store", None) or default_store()
    return _ACTIONS[arguments.action](arguments, store)


def _checksum(arguments: argparse.Namespace, _store: Path) -> int:
    """Print the checksum of a model; of a folder also the list that it is taken of, on standard error."""
    from gguf_acceptance import file_sha256

    from pascaline.cli.progress import ByteBar
    from pascaline.models.folder_files import folder_files, folder_sha256, listing
    from pascaline.models.reader import read_model

    path: Path = arguments.path
    files = [Path(file) for file in read_model(path).files]
    names = folder_files(path) if path.is_dir() else tuple(file.name for file in files)
    folder = path if path.is_dir() else path.parent
    digests = {name: file_sha256(folder / name, ByteBar(name)) for name in names}
    whole = folder_sha256(names, tuple(digests.values())) if path.is_dir() else ",".join(digests.values())
    if arguments.json:
        print(json.dumps({"path": str(path), "sha256": whole, "files": digests}, indent=2))
        return ExitCode.OK
    print(listing(digests), end="", file=sys.stderr)
    print(whole)
    return ExitCode.OK


def _add(arguments: argparse.Namespace, store: Path) -> int:
    from pascaline.cli.progress import ByteBar
    from pascaline.models.library import add

    added = add(
        store,
        arguments.name,
        arguments.source,
        arguments.sha256,
        headers=token_headers(arguments.token_file),
        target=arguments.target,
        replace=arguments.replace,
        on_part=lambda part, parts: ByteBar(arguments.name if parts == 1 else f"{arguments.name} {part + 1}/{parts}"),
    )
    if arguments.json:
        print(json.dumps({"path": str(added.path), "sha256": added.sha256, "verified": added.verified}))
        return ExitCode.OK
    words = "was there already" if added.was_there else "is in place"
    print(f"{added.path}: {words}, sha256 {added.sha256}{', verified' if added.verified else ''}")
    if not added.verified:
        verify = ["pascaline", "models", "verify", arguments.name, "--sha256", added.sha256]
        verify += ["--store", str(arguments.store)] if arguments.store else []
        print(
            "pascaline models: no checksum was given, so nothing proves that this is the right file; compare the "
            f"sha256 with another source, then run: {shlex.join(verify)}",
            file=sys.stderr,
        )
    return ExitCode.OK


def _list(arguments: argparse.Namespace, store: Path) -> int:
    from pascaline.models.library import entries

    return _print(arguments, entries(store), f"no models in {store}")


def _verify(arguments: argparse.Namespace, store: Path) -> int:
    from pascaline.cli.progress import ByteBar
    from pascaline.engines.served import refusal_of_all
    from pascaline.models.library import entries, problems, verify

    names = arguments.names or sorted({entry.name for entry in entries(store)})
    if arguments.sha256 and len(names) != 1:
        raise ConfigurationError("--sha256: belongs to one model, must be given with exactly one NAME")
    found = [entry for name in names for entry in verify(store, name, arguments.sha256, ByteBar(name))]
    _print(arguments, found, f"no models in {store}")
    wrong = problems(found, refusal_of_all)
    for text in wrong:
        print(f"pascaline models: {text}", file=sys.stderr)
    changed = [entry for entry in found if entry.state == "changed"]
    for entry in changed:
        print(
            f"pascaline models: {entry.path} has sha256 {entry.sha256}, must be {entry.expected}; bring the file "
            f"again: pascaline models remove {entry.name}, then add it",
            file=sys.stderr,
        )
    return ExitCode.MODEL if changed or wrong else ExitCode.OK


def _print(arguments: argparse.Namespace, found: list[Entry], nothing: str) -> int:
    if arguments.json:
        print(json.dumps([_plain(entry) for entry in found], indent=2))
    elif not found:
        print(nothing)
    else:
        rows = [(entry.name, format_bytes(entry.bytes), entry.state, str(entry.path)) for entry in found]
        print("\n".join(table_lines(rows, [LEFT, RIGHT, LEFT, LEFT])))
    return ExitCode.OK


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": str(entry.path),
        "bytes": entry.bytes,
        "state": entry.state,
        "sha256": entry.sha256,
    }


def _remove(arguments: argparse.Namespace, store: Path) -> int:
    from pascaline.models.library import remove

    freed = remove(store, arguments.name)
    print(json.dumps({"freed_bytes": freed}) if arguments.json else f"{format_bytes(freed)} freed")
    return ExitCode.OK


def _gc(arguments: argparse.Namespace, store: Path) -> int:
    from pascaline.models.cache import cache_folder
    from pascaline.models.library import delete, garbage
    from pascaline.settings import Settings

    keep = frozenset(arguments.keep) if arguments.keep else None
    found = garbage(store, cache_folder(Settings()), keep)
    if not arguments.dry_run:
        for waste in found:
            delete(waste)
    if arguments.json:
        print(json.dumps([{"path": str(w.path), "bytes": w.bytes, "reason": w.reason} for w in found], indent=2))
        return ExitCode.OK
    rows = [(format_bytes(waste.bytes), str(waste.path), f"({waste.reason})") for waste in found]
    for line in table_lines(rows, [RIGHT, LEFT, LEFT]):
        print(line)
    freed = format_bytes(sum(waste.bytes for waste in found))
    print(f"{freed} {'would be freed' if arguments.dry_run else 'freed'}")
    return ExitCode.OK


_ACTIONS = {"add": _add, "checksum": _checksum, "list": _list, "verify": _verify, "remove": _remove, "gc": _gc}
