"""The command line: one module per command, imported only when it is called, so that --help answers at once.

A command's module has `DESCRIPTION`, `add_arguments(parser)` and `run(arguments) -> int` (an exit code).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from pascaline import __version__
from pascaline.errors import ExitCode, PascalineError
from pascaline.redaction import protect_named, redact

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

# Command -> its summary in --help. The module is pascaline.cli.<command>.
COMMANDS = {
    "serve": "plan, launch and supervise an engine that serves one model",
    "plan": "show how much memory a model needs on a card, whether it fits, and the best settings",
    "completion": "print a script that completes commands and options in a shell",
    "config": "show, check or describe the settings and where each value comes from",
    "doctor": "find out what keeps this host from serving, and what to do about it",
    "exporter": "serve GPU metrics to Prometheus (NVML)",
    "bench": "measure an instance under load: batch sizes, contexts, rates, weight types",
    "models": "download, verify, list and delete model files",
    "profile": "record the kernels of a decode and compare them with the card's roofline",
    "quantize": "make smaller weights with llama.cpp's tools",
    "service": "run an instance as a systemd unit on a host without NixOS",
    "top": "show GPUs and instances of this host or a fleet, live",
}


class Parser(argparse.ArgumentParser):
    """A parser that prints an error in one line and a hint to --help, without pages of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with ExitCode.CONFIGURATION."""
        self.exit(ExitCode.CONFIGURATION, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return its exit code."""
    protect_named(os.environ)
    sys.excepthook = _show_uncaught
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _top_parser()
    if not arguments:
        parser.print_help()
        return ExitCode.CONFIGURATION
    known = parser.parse_args(arguments[:1])
    return _run_command(known.command, arguments[1:])


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does, but with secrets hidden."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _top_parser() -> Parser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    codes = "\n".join(f"  {code.value:>3}  {code.meaning}" for code in ExitCode)
    parser = Parser(
        prog="pascaline",
        usage="pascaline COMMAND [OPTIONS]",
        description="Serve language models on Pascal GPUs (Tesla P4, P40, P100, GTX 10xx).",
        epilog=f"commands (for details: pascaline COMMAND --help):\n{listing}\n\nexit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Optional for argparse alone: otherwise an unknown flag is reported as a missing command.
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=f"pascaline {__version__}")
    return parser


def _run_command(name: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f"pascaline.cli.{name}")
    parser = Parser(
        prog=f"pascaline {name}",
        description=module.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments)))
    except PascalineError as error:
        print(redact(f"pascaline {name}: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`pascaline … | head`), so nothing more can be printed.
        sys.stderr.close()
        return ExitCode.OK
