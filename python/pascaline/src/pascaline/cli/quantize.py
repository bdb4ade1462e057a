"""`pascaline quantize`: smaller weights by llama.cpp's own tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.cli.signals import interrupt_on_sigterm
from pascaline.errors import ConfigurationError, ExitCode
from pascaline.units import format_bytes

if TYPE_CHECKING:
    import argparse

    from pascaline.quantize import Quantized

DESCRIPTION = """Quantise a model: a Hugging Face folder, or a GGUF file of type F16, BF16 or F32.

  pascaline quantize emily-F16.gguf --type Q4_K_M                 writes emily.Q4_K_M.gguf beside it
  pascaline quantize ./emily --type Q4_K_M Q6_K Q8_0 -o out       a Hugging Face folder to three types
  pascaline quantize emily-F16.gguf --type Q3_K_M --calibration text.txt   with an importance matrix

Each result is written completely or not at all, compared with its source, tested by generating a few tokens, and gets a
.sha256 file for `sha256sum -c`. After an interruption, the same command makes the missing types. The programs
llama-quantize, llama-imatrix and llama-completion must be on PATH or in --tools. A Hugging Face folder also needs
convert_hf_to_gguf.py, and a Python with torch, transformers and gguf.

`pascaline doctor` warns of types without kernels in the plugin: these are expanded to 16 bits when loaded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="Hugging Face folder or GGUF file")
    parser.add_argument("--type", nargs="+", required=True, metavar="TYPE", dest="types", help="types to make")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR|FILE", help="folder, or a .gguf file for one type")
    calibration = parser.add_mutually_exclusive_group()
    calibration.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix to use")
    calibration.add_argument("--calibration", type=Path, metavar="TEXT", help="text to compute one from")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of llama-quantize (default: all)")
    parser.add_argument("--allow-requantize", action="store_true", help="accept a source that is already quantised")
    parser.add_argument("--no-verify", action="store_true", help="do not test the results by generating tokens")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    parser.add_argument("--tools", type=Path, metavar="DIR", help="folder of llama.cpp's programs (default: PATH)")
    parser.add_argument("--converter", type=Path, metavar="FILE", help="convert_hf_to_gguf.py (default: on PATH)")
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="Python that runs the converter (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and print each result."""
    from pascaline.quantize import Options, Tools, quantize, quantize_all

    _check(arguments)
    interrupt_on_sigterm()
    options = Options(
        tools=Tools(arguments.tools, arguments.converter, arguments.python or Path(sys.executable)),
        imatrix=arguments.imatrix,
        calibration=arguments.calibration,
        threads=arguments.threads,
        allow_requantize=arguments.allow_requantize,
        verify=not arguments.no_verify,
        force=arguments.force,
    )
    steps = _Steps()
    output = arguments.output
    if output is not None and output.suffix == ".gguf":
        results = [quantize(arguments.model, arguments.types[0], output, options=options, on_step=steps)]
    else:
        folder = output or arguments.model.absolute().parent
        results = quantize_all(arguments.model, arguments.types, folder, options=options, on_step=steps)
    if arguments.json:
        print(json.dumps([_plain(result) for result in results], indent=2))
        return ExitCode.OK
    for result in results:
        print(_line(result))
    return ExitCode.OK


def _check(arguments: argparse.Namespace) -> None:
    if arguments.output is not None and arguments.output.suffix == ".gguf" and len(arguments.types) != 1:
        raise ConfigurationError("--output: names a file, must be a folder for several types")
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigurationError(f"--threads must be at least 1, got {arguments.threads}")
    for flag, path in (("--imatrix", arguments.imatrix), ("--calibration", arguments.calibration)):
        if path is not None and not path.is_file():
            raise ConfigurationError(f"{flag}: {path} is not a file")


def _plain(result: Quantized) -> dict[str, object]:
    return {
        "path": str(result.path),
        "type": result.type,
        "bytes": result.bytes,
        "sha256": result.sha256,
        "was_there": result.was_there,
        "seconds": round(result.seconds, 3),
        "text": result.text,
    }


def _line(result: Quantized) -> str:
    if result.was_there:
        return f"{result.path}: was there already, {format_bytes(result.bytes)}, sha256 {result.sha256}"
    generated = f", generates {result.text!r}" if result.text else ""
    return f"{result.path}: {format_bytes(result.bytes)} in {result.seconds:.1f} s, sha256 {result.sha256}{generated}"


class _Steps:
    """Shows one line per step: updated in place on a terminal, otherwise written when the step begins."""

    def __init__(self) -> None:
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        share = done / total if total else 1.0
        if sys.stderr.isatty():
            bar = ("█" * round(24 * share)).ljust(24, "·")
            sys.stderr.write(f"\r\033[K{what} {bar} {share:4.0%}" + ("\n" if done >= total else ""))
        elif what != self._what:
            sys.stderr.write(f"{what} …\n")
        self._what = what
        sys.stderr.flush()
