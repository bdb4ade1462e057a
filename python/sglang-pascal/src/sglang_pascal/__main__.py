"""The `sglang-pascal` command: prepares models, tests the kernels, shows what the plugin does on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_pascal.errors import PluginError
from sglang_pascal.names import LOAD_FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXIT_CODES = """exit codes:
  0  done
  1  a case of the selftest failed
  2  wrong usage
  3  the model is missing, damaged, has another checksum or is not supported
  5  a kernel could not be loaded or started
  8  SGLang, torch or a compiler of CUDA 11.8 is missing, or has a version that this plugin or the card cannot use
  9  a disk is full, or a folder may not be written"""

MAX_JOBS = 64
"""Most processes of a selftest: there are no more groups of kernels."""


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gguf", metavar="FILE.gguf", type=Path, help="the model; of a split model, any part")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="folder to make; no weights are copied into it")
    checksum = parser.add_mutually_exclusive_group()
    checksum.add_argument(
        "--sha256", metavar="HEX[,HEX…]", help="refuse a file with another checksum; of a split model one for each part"
    )
    checksum.add_argument("--known-sha256", metavar="HEX", help="its known checksum, which is not computed again")
    parser.add_argument("--json", action="store_true", help="print the folder's pascal.json")


def _run_prepare(args: argparse.Namespace) -> int:
    from sglang_pascal.checkpoint.prepare import prepare

    checksums = {"sha256": args.sha256, "known_sha256": args.known_sha256}
    manifest = prepare(args.gguf, args.folder, **checksums, on_progress=_progress_printer())
    if args.json:
        import json

        _say(json.dumps(asdict(manifest), indent=2))
    else:
        _say(f"{args.folder}: {manifest.architecture}, {manifest.size} bytes, sha256 {manifest.sha256}")
        _say(f"serve it: python -m sglang.launch_server --model-path {args.folder} --load-format {LOAD_FORMAT}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _progress_printer() -> Callable[[int, int], None] | None:
    """Return a printer of the hashed share of the file, on one line of a terminal; None without a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\rchecksum {100 * done // total:3d} %{end}")
        sys.stderr.flush()

    return show


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--card",
        metavar="X.Y",
        type=_capability,
        help="suppose a card of this compute capability instead of what is in the machine: 6.1 for a Tesla P4 or P40 "
        "or a GTX 10xx, 6.0 for a P100",
    )


def _run_info(args: argparse.Namespace) -> int:
    from sglang_pascal.info import print_info

    return print_info(as_json=args.json, card=args.card)


def _capability(text: str) -> tuple[int, int]:
    """Return 6.1 as (6, 1)."""
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 6.1")
    return int(match[1]), int(match[2])


def _add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON, which is the only form and need not be asked for")


def _run_facts(args: argparse.Namespace) -> int:
    del args
    from sglang_pascal.facts import print_facts

    return print_facts()


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output, with every loop's instructions")
    parser.add_argument("--architecture", choices=("60", "61"), default="61", help="60 is the P100; default: 61")
    parser.add_argument("--update", metavar="FILE.md", type=Path, help="put the table between its marks in a document")


def _run_kernels(args: argparse.Namespace) -> int:
    from sglang_pascal.kernels.bounds import print_table, update_document

    if args.update:
        update_document(args.update)
    else:
        print_table(args.architecture, as_json=args.json)
    return 0


def _add_selftest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_jobs,
        default=1,
        help="processes at once (default: 1): on a card newer than Pascal the driver compiles every kernel: "
        "minutes in one process. Each takes some hundred MB of the card's memory",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only cases whose names start so; default: all")


def _jobs(text: str) -> int:
    """Read a number of processes."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_JOBS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {MAX_JOBS}")
    return int(text)


def _run_selftest(args: argparse.Namespace) -> int:
    from sglang_pascal.selftest import print_selftest

    return print_selftest(as_json=args.json, names=args.names or None, jobs=args.jobs)


COMMANDS = {
    "prepare": ("make a folder that SGLang can serve from a GGUF file", _add_prepare, _run_prepare),
    "kernels": ("show what the compiler made of each kernel for Pascal, without a GPU", _add_kernels, _run_kernels),
    "selftest": ("compare every operation with its reference on this host's GPU", _add_selftest, _run_selftest),
    "facts": ("print as JSON what the plugin can do, on any machine", _add_facts, _run_facts),
    "info": ("show what the plugin does on this machine, and why", _add_info, _run_info),
}
"""Name -> (help, adds the arguments, runs it and returns the exit code)."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command of the table."""
    parser = argparse.ArgumentParser(
        prog="sglang-pascal",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; an error that a user can cause is one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except PluginError as exc:
        sys.stderr.write(f"sglang-pascal: error: {exc}\n")
        return exc.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
