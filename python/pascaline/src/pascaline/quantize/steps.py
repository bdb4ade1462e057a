"""The steps of a quantisation, each a function. A step writes under a temporary name until its file is complete."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_acceptance import file_sha256

from pascaline.errors import ModelError, PascalineError, StorageError
from pascaline.models.reader import read_model
from pascaline.quantize.tools import Ended, Tools, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from pascaline.models.spec import ModelSpec

OnDone = Callable[[int, int], None]
"""Called with (done, total)."""

SPACE_MARGIN = 1.01
"""llama-quantize prints sizes with two decimals of a MiB and leaves out the header."""
HEADER_BYTES = 32 * 2**20
"""More than the metadata of any model: a vocabulary of 262,144 entries takes about 10 MiB."""
PROMPT = "The capital of France is"
GENERATED_TOKENS = 8
GENERATE_SECONDS = 600.0
CHECKSUM_SUFFIX = ".sha256"

_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_SIZE = re.compile(r"quant size\s*=\s*([\d.]+) (MiB|MB|GiB)")
_CHUNK = re.compile(r"\[(\d+)\]-?[\d.]+,")
_CHUNKS = re.compile(r"over (\d+) chunks")
_PERCENT = re.compile(r"Writing:\s*(\d+)%")
_NO_SPACE = re.compile(r"No space left on device|ENOSPC")
_FULL_PRECISION = re.compile(r"[._-](?:f16|f32|bf16|fp16|fp32)$", re.IGNORECASE)


def stem_of(source: Path) -> str:
    """Return the name of a model without its type: `emily-F16.gguf` -> `emily`."""
    return _FULL_PRECISION.sub("", source.stem if source.suffix == ".gguf" else source.name)


class PlainSource:
    """The GGUF file of 16 or 32 bits to quantise from: the source, or a conversion that is deleted afterwards."""

    def __init__(self, source: Path, spec: ModelSpec, folder: Path, tools: Tools, on_percent: OnDone) -> None:
        """folder: for the conversion."""
        self._source, self._spec, self._folder, self._tools, self._on_percent = source, spec, folder, tools, on_percent
        self._converted: Path | None = None

    def __enter__(self) -> Path:
        _make_folder(self._folder)
        if self._spec.format == "gguf":
            return Path(str(self._spec.files[0]))
        _clear_left(self._folder, f".{stem_of(self._source)}", ".converted.gguf")
        self._converted = self._folder / f".{stem_of(self._source)}.{os.getpid()}.converted.gguf"
        try:
            convert(self._tools, self._source, self._spec, self._converted, self._on_percent)
        except BaseException:
            self._converted.unlink(missing_ok=True)
            raise
        return self._converted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._converted is not None:
            self._converted.unlink(missing_ok=True)


def convert(tools: Tools, source: Path, spec: ModelSpec, target: Path, on_percent: OnDone) -> None:
    """Convert a Hugging Face folder to a GGUF file in the 16-bit type of its weights."""
    needed = 2 * spec.n_parameters + HEADER_BYTES
    _require_free(target.parent, needed, f"the conversion of {source}")
    command = [*tools.command("convert"), str(source), "--outfile", str(target), "--outtype", "auto"]
    ended = run(command, _matching(_PERCENT, lambda match: on_percent(int(match[1]), 100)))
    if ended.code or not target.exists():
        raise _failed("convert", source, ended, needed, target.parent)


def importance_matrix(tools: Tools, source: Path, text: Path, folder: Path, on_chunk: OnDone) -> Path:
    """Return an importance matrix of the source over a text; compute it if the folder does not hold it yet."""
    # llama-quantize would use the matrix of another text or model without a warning.
    inputs = hashlib.sha256(repr([_state(source), _state(text)]).encode()).hexdigest()[:8]
    target = folder / f"{stem_of(source)}.{text.stem}.{inputs}.imatrix.gguf"
    if target.exists():
        return target
    total = 0

    def on_line(line: str) -> None:
        nonlocal total
        if match := _CHUNKS.search(line):
            total = int(match[1])
        for match in _CHUNK.finditer(line):
            on_chunk(int(match[1]), max(total, int(match[1])))

    with unfinished(target) as partial:
        command = [*tools.command("imatrix"), "-m", str(source), "-f", str(text), "-o", str(partial)]
        ended = run(command, on_line)
        if ended.code or not partial.exists():
            raise _failed("compute the importance matrix of", source, ended, 0, folder)
        partial.replace(target)
    return target


def require_space(tools: Tools, source: Path, name: str, output: Path, threads: int | None) -> None:
    """Refuse a quantisation for which the disk has no room, before anything is written."""
    needed = planned_bytes(tools, source, name, threads)
    _require_free(output.parent, needed, output.name)


def planned_bytes(tools: Tools, source: Path, name: str, threads: int | None = None) -> int:
    """Return the bytes that a result will need: by llama-quantize's plan, or at most the size of the source."""
    lines: list[str] = []
    command = [*tools.command("quantize"), "--dry-run", "--allow-requantize", str(source), name]
    ended = run([*command, *([str(threads)] if threads else [])], lines.append)
    sizes = [match for line in lines if (match := _SIZE.search(line))]
    # A release without --dry-run ends and prints its usage.
    if ended.code or not sizes:
        return source.stat().st_size
    unit = 2**30 if sizes[-1][2] == "GiB" else 2**20
    return round(float(sizes[-1][1]) * unit * SPACE_MARGIN) + _header_bytes(source)


def _header_bytes(source: Path) -> int:
    return min((tensor.data_offset for tensor in read_model(source).tensors), default=HEADER_BYTES)


def run_quantizer(
    tools: Tools,
    source: Path,
    partial: Path,
    name: str,
    *,
    imatrix: Path | None,
    threads: int | None,
    allow_requantize: bool,
    on_tensor: OnDone,
) -> None:
    """Write the quantised model to `partial`."""
    command = tools.command("quantize")
    if allow_requantize:
        command.append("--allow-requantize")
    if imatrix is not None:
        command += ["--imatrix", str(imatrix)]
    command += [str(source), str(partial), name, *([str(threads)] if threads else [])]
    ended = run(command, _matching(_TENSOR, lambda match: on_tensor(int(match[1]), int(match[2]))))
    if ended.code:
        raise _failed(f"quantise to {name}", source, ended, 0, partial.parent)


def verify_header(source: Path, result: Path, name: str) -> None:
    """Compare a result's header with its source: every tensor, of the same size, in a file of the requested type."""
    before, after = read_model(source), read_model(result)
    sizes = {tensor.name: tensor.n_elements for tensor in before.tensors}
    found = {tensor.name: tensor.n_elements for tensor in after.tensors}
    if sizes != found:
        odd = sorted(set(sizes.items()) ^ set(found.items()))
        raise ModelError(f"{result} has other tensors than {source}: {odd[0][0]} and {len(odd) - 1} more")
    if after.file_type != name:
        raise ModelError(f"{result} says that it is {after.file_type}, must be {name}")


def verify_generation(tools: Tools, result: Path) -> str:
    """Load a result, let it generate some tokens on the CPU, and return them. Raises ModelError if it cannot."""
    command = [*tools.command("generate"), "-m", str(result), "-p", PROMPT, "-n", str(GENERATED_TOKENS)]
    command += ["--temp", "0", "-ngl", "0", "-c", "256", "--no-display-prompt", "-no-cnv"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GENERATE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{result} generated nothing within {GENERATE_SECONDS:.0f} s") from error
    text = done.stdout.strip()
    if done.returncode or not text:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise ModelError(f"{result} does not generate: exit code {done.returncode}: {last.strip()}")
    return text


def finish(partial: Path, output: Path, origin: str, on_bytes: OnDone) -> str:
    """Give a result its name and its checksum file, and return the checksum. origin: the text from origin_of."""
    digest = file_sha256(partial, lambda done, total: on_bytes(done, total or done))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    # The checksum of an earlier file must not lie beside the new one.
    checksum = output.with_name(output.name + CHECKSUM_SUFFIX)
    checksum.unlink(missing_ok=True)
    partial.replace(output)
    note = partial.with_name(partial.name + CHECKSUM_SUFFIX)
    # sha256sum takes a line that begins with # for a comment.
    note.write_text(f"# {origin}\n{digest}  {output.name}\n")
    note.replace(checksum)
    return digest


def origin_of(source: Path, name: str, *inputs: Path | None) -> str:
    """Return a text that changes whenever a result would: the type, and name, size and time of each input."""
    files = sorted(file for file in source.iterdir() if file.is_file()) if source.is_dir() else [source]
    files += [path for path in inputs if path is not None]
    states = [_state(file) for file in files]
    return f"{name} of {source.name}, inputs {hashlib.sha256(repr(states).encode()).hexdigest()[:32]}"


def _state(file: Path) -> tuple[str, int, int]:
    """Return what changes when a file does: name, size, time of change."""
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns


def digest_if_unchanged(output: Path, origin: str) -> str | None:
    """Return the checksum of a result that is unchanged and comes from the same origin; None otherwise."""
    checksum = output.with_name(output.name + CHECKSUM_SUFFIX)
    try:
        comment, _, line = checksum.read_text().partition("\n")
        expected = line.split()[0]
        return expected if comment == f"# {origin}" and file_sha256(output) == expected else None
    except (OSError, IndexError):
        return None


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Give a file in the target's folder to write to; if it still exists at the end, it is deleted."""
    _make_folder(target.parent)
    _clear_left(target.parent, f".{target.name}", ".partial")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _clear_left(folder: Path, begin: str, end: str) -> None:
    """Delete what killed processes left: gigabytes, in files named after the number of a process that has ended."""
    for file in folder.glob(f"{glob.escape(begin)}.*{end}"):
        pid = file.name.removeprefix(f"{begin}.").removesuffix(end)
        if pid.isdigit() and not Path("/proc", pid).exists():
            file.unlink(missing_ok=True)


def _matching(pattern: re.Pattern[str], act: Callable[[re.Match[str]], None]) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        if match := pattern.search(line):
            act(match)

    return on_line


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"failed to write to {folder}: {error.strerror}; name another folder with --output"
        ) from error


def _require_free(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"no space in {folder}: {free} bytes are free, {what} needs {needed}; "
            "make room, or name another folder with --output"
        )


def _failed(verb: str, source: Path, ended: Ended, needed: int, folder: Path) -> PascalineError:
    if any(_NO_SPACE.search(line) for line in ended.last_lines):
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(folder).free
        return StorageError(
            f"no space in {folder}: {free} bytes are free, {needed or 'more'} are needed; "
            "make room, or name another folder with --output"
        )
    return ModelError(f"failed to {verb} {source}: {ended.reason}")
