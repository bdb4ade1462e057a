"""Quality of a GGUF file by llama.cpp's llama-perplexity: perplexity, and KL divergence from a reference."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pascaline.child import with_parent
from pascaline.errors import PascalineError, StorageError
from pascaline.quantize.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROGRAM = "llama-perplexity"
WINDOW_TOKENS = 512
"""Tokens in one chunk; the second half of each is scored, as in llama.cpp's published tables."""
SCORE_BYTES = 2
"""Size of one token's probability in the reference file (tools/perplexity: 16-bit logarithms)."""
ALL_LAYERS = 999
LAST_LINES = 20

_CHUNK = re.compile(r"\[(\d+)\]|^ *(\d+) +[\d.]+ ±", re.MULTILINE)
_FINAL = re.compile(r"Final estimate: PPL = ([\d.]+|nan|inf) \+/- ([\d.]+|nan|inf)")
_STATISTICS = {
    "perplexity": re.compile(r"^Mean PPL\(Q\) +: +([\d.]+)", re.MULTILINE),
    "perplexity_error": re.compile(r"^Mean PPL\(Q\) +: +[\d.]+ ± +([\d.]+)", re.MULTILINE),
    "perplexity_ratio": re.compile(r"^Mean PPL\(Q\)/PPL\(base\) +: +([\d.]+)", re.MULTILINE),
    "kl_mean": re.compile(r"^Mean +KLD: +(-?[\d.]+)", re.MULTILINE),
    "kl_mean_error": re.compile(r"^Mean +KLD: +-?[\d.]+ ± +([\d.]+)", re.MULTILINE),
    "kl_p99": re.compile(r"^99\.0% +KLD: +(-?[\d.]+)", re.MULTILINE),
    "same_top": re.compile(r"^Same top p: +([\d.]+)", re.MULTILINE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How quality is measured; the same for all types in one comparison."""

    text: Path
    chunks: int
    on_gpu: bool
    threads: int
    tools: Tools = field(default_factory=Tools)


def score_reference(
    model: Path, scoring: Scoring, reference: Path, on_chunk: Callable[[int], None]
) -> dict[str, float]:
    """Measure the model that the others are compared with, and keep its probabilities in `reference`."""
    output = _run(model, scoring, ["--kl-divergence-base", str(reference)], on_chunk)
    match = _FINAL.search(output)
    if match is None:
        raise PascalineError(f"{PROGRAM}: no final estimate for {model}; its last lines: {_end(output)}")
    return {"perplexity": float(match[1]), "perplexity_error": float(match[2])}


def score(model: Path, scoring: Scoring, reference: Path, on_chunk: Callable[[int], None]) -> dict[str, float]:
    """Measure a model against the reference: perplexity, KL divergence in nats, share of equal top tokens."""
    output = _run(model, scoring, ["--kl-divergence-base", str(reference), "--kl-divergence"], on_chunk)
    found = {key: float(match[1]) for key, pattern in _STATISTICS.items() if (match := pattern.search(output))}
    if missing := sorted(_STATISTICS.keys() - found.keys()):
        raise PascalineError(f"{PROGRAM}: no {', '.join(missing)} for {model}; its last lines: {_end(output)}")
    return found | {"same_top": found["same_top"] / 100}


def reference_bytes(chunks: int, vocab_size: int) -> int:
    """Return the size of a reference file: the whole vocabulary's probabilities for each scored token."""
    return chunks * WINDOW_TOKENS // 2 * vocab_size * SCORE_BYTES


def check_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise StorageError if a disk has too little room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {purpose} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            "name another disk with --output, or measure fewer chunks with --chunks"
        )


def _run(model: Path, scoring: Scoring, arguments: Sequence[str], on_chunk: Callable[[int], None]) -> str:
    command = [*scoring.tools.command("perplexity"), "--model", str(model), "--file", str(scoring.text)]
    command += ["--ctx-size", str(WINDOW_TOKENS)]
    command += ["--chunks", str(scoring.chunks), "--threads", str(scoring.threads)]
    command += ["--n-gpu-layers", str(ALL_LAYERS if scoring.on_gpu else 0), *arguments]
    with subprocess.Popen(
        with_parent(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output = _read(process, on_chunk)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise PascalineError(
            f"{PROGRAM} ended with exit code {process.returncode} for {model}; its last lines: {_end(output)}"
        )
    return output


def _read(process: subprocess.Popen[bytes], on_chunk: Callable[[int], None]) -> str:
    """Return all output. Report each chunk as it comes, not by line: the program prints them all in one line."""
    assert process.stdout is not None
    output = ""
    while data := os.read(process.stdout.fileno(), 65536):
        output += data.decode(errors="replace")
        done = [int(first or second) for first, second in _CHUNK.findall(output[-4096:])]
        if done:
            on_chunk(done[-1])
    return output


def _end(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-LAST_LINES:])[-1000:]
