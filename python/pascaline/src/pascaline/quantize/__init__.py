"""Quantises models with llama.cpp's own tools: planned, written completely or not at all, verified, with a checksum.

tools   the programs, and how they are run
steps   one step each: convert, importance matrix, size, quantise, verify

A source is a Hugging Face folder or a GGUF file of 16 or 32 bits. Beside each result STEM.TYPE.gguf lies
STEM.TYPE.gguf.sha256 in the format of sha256sum, with a comment that names the source. A result that exists, comes from
the same source and still has its checksum is not made again: an interrupted run continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pascaline.errors import ConfigurationError, ModelError
from pascaline.models.ggml_types import FILE_TYPES
from pascaline.models.reader import read_model
from pascaline.quantize import steps
from pascaline.quantize.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pascaline.models.spec import ModelSpec

__all__ = ["COMMON_TYPES", "Options", "Quantized", "Tools", "quantize", "quantize_all"]

COMMON_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q3_K_S")
"""The types that the guide compares, the largest first."""
PLAIN_TYPES = frozenset({"F32", "F16", "BF16"})

OnStep = Callable[[str, int, int], None]
"""Called with (name of the step, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to quantise."""

    tools: Tools = field(default_factory=Tools)
    imatrix: Path | None = None
    """Importance matrix written by llama-imatrix."""
    calibration: Path | None = None
    """Text from which to compute an importance matrix; at most one of this and imatrix is set."""
    threads: int | None = None
    """None: llama.cpp's default."""
    allow_requantize: bool = False
    """Whether the source may be quantised already, which costs quality twice."""
    verify: bool = True
    """Whether to load each result and generate some tokens."""
    force: bool = False
    """Whether to make existing results again."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """One result."""

    path: Path
    type: str
    bytes: int
    sha256: str
    was_there: bool
    seconds: float
    text: str | None
    """What it generated when it was verified; None if it was not verified."""


def quantize(
    source: Path | str,
    type: str,  # noqa: A002 - the name that llama-quantize and the GGUF format use
    output: Path | str,
    *,
    options: Options | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
) -> Quantized:
    """Quantise a model to one type. output: the GGUF file to make.

    Raises ConfigurationError for an unknown type, ModelError for an invalid source or result, MissingError if a tool is
    not installed, StorageError if the disk is too small.
    """
    return _all(Path(source), {_known(type): Path(output)}, options or Options(), on_step)[0]


def quantize_all(
    source: Path | str,
    types: Sequence[str],
    folder: Path | str,
    *,
    options: Options | None = None,
    on_step: OnStep = lambda _what, _done, _total: None,
) -> list[Quantized]:
    """Quantise a model to several types, converting it from Hugging Face once. Results are STEM.TYPE.gguf."""
    folder, stem = Path(folder), steps.stem_of(Path(source))
    outputs = {name: folder / f"{stem}.{name}.gguf" for name in map(_known, types)}
    return _all(Path(source), outputs, options or Options(), on_step)


def _all(source: Path, outputs: dict[str, Path], options: Options, on_step: OnStep) -> list[Quantized]:
    """Make the missing results; the source is converted only if one is missing."""
    read_model(source)  # check the source first: an invalid one is reported before any work starts
    origins = {name: steps.origin_of(source, name, options.imatrix, options.calibration) for name in outputs}
    made = {name: _made(name, path, origins[name]) for name, path in outputs.items() if not options.force}
    results = {name: result for name, result in made.items() if result is not None}
    missing = {name: path for name, path in outputs.items() if name not in results}
    if missing:
        _require_tools(source, options)
        folder = next(iter(missing.values())).parent
        with _plain_source(source, folder, options, on_step) as plain:
            for name, path in missing.items():
                results[name] = _one(plain, name, path, origins[name], options, on_step)
    return [results[name] for name in outputs]


def _require_tools(source: Path, options: Options) -> None:
    """Raise MissingError before any work starts: the last program is needed only when all the work is done."""
    tools = ["quantize"]
    tools += ["convert"] if source.is_dir() else []
    tools += ["imatrix"] if options.calibration is not None else []
    tools += ["generate"] if options.verify else []
    for tool in tools:
        options.tools.command(tool)


def _made(name: str, output: Path, origin: str) -> Quantized | None:
    """Return the existing result if it comes from this source and still has its checksum; None otherwise."""
    digest = steps.digest_if_unchanged(output, origin)
    return None if digest is None else Quantized(output, name, output.stat().st_size, digest, True, 0.0, None)


def _known(name: str) -> str:
    upper = name.upper()
    if upper not in FILE_TYPES.values():
        raise ConfigurationError(f"--type: unknown type {name!r}, must be one of: {', '.join(FILE_TYPES.values())}")
    return upper


def _plain_source(source: Path, folder: Path, options: Options, on_step: OnStep) -> steps.PlainSource:
    spec = read_model(source)
    if spec.format == "gguf":
        _require_plain(source, spec, options)
    return steps.PlainSource(source, spec, folder, options.tools, lambda done, total: on_step("convert", done, total))


def _require_plain(source: Path, spec: ModelSpec, options: Options) -> None:
    quantized = sorted({tensor.tensor_type for tensor in spec.tensors} - PLAIN_TYPES)
    if quantized and not options.allow_requantize:
        raise ModelError(
            f"{source} is quantised already ({', '.join(quantized)}), must be of type F16, BF16 or F32; "
            "take the original, or accept the loss with --allow-requantize"
        )


def _one(plain: Path, name: str, output: Path, origin: str, options: Options, on_step: OnStep) -> Quantized:
    began = time.monotonic()
    if plain.resolve() == output.resolve():
        raise ConfigurationError(f"output: {output} is the source itself, must be another file")
    imatrix = options.imatrix
    if options.calibration is not None:
        imatrix = steps.importance_matrix(
            options.tools, plain, options.calibration, output.parent, lambda d, t: on_step("importance matrix", d, t)
        )
    steps.require_space(options.tools, plain, name, output, options.threads)
    with steps.unfinished(output) as partial:
        steps.run_quantizer(
            options.tools,
            plain,
            partial,
            name,
            imatrix=imatrix,
            threads=options.threads,
            allow_requantize=options.allow_requantize,
            on_tensor=lambda done, total: on_step(name, done, total),
        )
        steps.verify_header(plain, partial, name)
        text = None
        if options.verify:
            on_step(f"{name}: generate", 0, 1)
            text = steps.verify_generation(options.tools, partial)
            on_step(f"{name}: generate", 1, 1)
        digest = steps.finish(partial, output, origin, lambda done, total: on_step(f"{name}: checksum", done, total))
    return Quantized(output, name, output.stat().st_size, digest, False, time.monotonic() - began, text)
