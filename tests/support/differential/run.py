"""Gives the models of the table to both engines, and keeps what came of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sglang_pascal.checkpoint.prepare import prepare
from sglang_pascal.cpu import recommended_cpu_settings
from sglang_pascal.errors import CheckpointError
from support.differential import llama_side
from support.differential.texts import NASTY
from support.differential.tiny import metadata, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from support.differential.table import Row

LENGTHS: Final = (1, 9, 40)
"""Prompts of one batch: a single token, about a window of a tiny Gemma, and many windows."""
STEPS: Final = 3
"""Tokens decoded after each prompt; llama.cpp gets them as part of longer prompts."""
POSITIONS: Final = tuple(sorted(length + step for length in LENGTHS for step in range(STEPS + 1)))
LOWEST_ID, HIGHEST_ID = 3, 100
"""Tokens of the prompts: in every vocabulary of the table."""
LONGEST_SECONDS: Final = 3000


@dataclass
class Outcome:
    """What came of one model."""

    theirs: llama_side.Served
    refusal: str = ""
    """Why the plugin refused it; empty if it did not."""
    error: str = ""
    """The end of the traceback if SGLang did not serve what the plugin accepted."""
    ids: list[list[int]] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In the words of the table."""
        if self.error:
            return "SGLang fails"
        if self.refusal:
            return "both refuse" if self.theirs.error else "SGLang refuses"
        return "llama.cpp refuses" if self.theirs.error else "agree"

    @property
    def difference(self) -> float:
        """Largest relative difference of log-probabilities over all positions."""
        return max(relative_difference(self.logprobs[n], self.theirs.logprobs[n]) for n in POSITIONS)


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Root mean square of the differences, relative to the spread of what is compared."""
    known: NDArray[np.float64] = np.array(theirs)
    return float(np.sqrt(np.mean((np.array(ours) - known) ** 2)) / np.std(known))


def serve_all(rows: Sequence[Row], folder: Path) -> dict[str, Outcome]:
    """Write the files, serve each by both engines at once, and return the outcomes by the rows' names."""
    files = {row.name: write(folder / f"{file_name(row)}.gguf", row.model) for row in rows}
    refusals = {name: _prepared(file) for name, file in files.items()}
    accepted = [row for row in rows if not refusals[row.name]]
    with _sglang(accepted, files, folder) as child, ThreadPoolExecutor(2) as pool:
        theirs = dict(zip(files, pool.map(_theirs, rows, files.values()), strict=True))
        served = _results(child, folder)
    return {name: _outcome(files[name], theirs[name], refusals[name], served.get(name, {})) for name in files}


def file_name(row: Row) -> str:
    """Return the name of its file, without the ending."""
    return re.sub(r"\W+", "-", row.name)


def prompt() -> list[int]:
    """The same ids for every model."""
    return np.random.default_rng(1).integers(LOWEST_ID, HIGHEST_ID, max(POSITIONS)).tolist()


def _prepared(file: Path) -> str:
    """Make the folder from which SGLang starts; return why it is refused, or an empty text."""
    try:
        prepare(file, file.with_suffix(""))
    except CheckpointError as error:
        return str(error)
    return ""


def _sglang(rows: Sequence[Row], files: dict[str, Path], folder: Path) -> subprocess.Popen[bytes]:
    models = {row.name: {"folder": str(files[row.name].with_suffix("")), "flags": row.flags} for row in rows}
    job = {
        "models": models,
        "texts": NASTY,
        "ids": prompt(),
        "lengths": LENGTHS,
        "steps": STEPS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    program = Path(__file__).with_name("sglang_side.py")
    environment = os.environ | recommended_cpu_settings().environment | {"CUDA_VISIBLE_DEVICES": ""}
    with (folder / "sglang.log").open("wb") as log:
        command = [sys.executable, program, folder / "job.json", folder / "result.json"]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _results(child: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    try:
        code = child.wait(LONGEST_SECONDS)
    finally:
        child.kill()
    assert code == 0, (folder / "sglang.log").read_text()[-3000:]
    results: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return results


def _theirs(row: Row, file: Path) -> llama_side.Served:
    tokens = metadata(row.model).get("tokenizer.ggml.tokens", ["a"])
    try:
        return llama_side.serve(file, NASTY, prompt(), POSITIONS, tokens)
    except (OSError, LookupError, ValueError) as error:  # the other models are still to be compared
        return llama_side.Served(error=f"llama-server was asked in vain: {error!r}")


def _outcome(file: Path, theirs: llama_side.Served, refusal: str, served: dict[str, Any]) -> Outcome:
    if refusal or "error" in served:
        return Outcome(theirs, refusal, served.get("error", ""))
    ends = json.loads((file.with_suffix("") / "generation_config.json").read_text())["eos_token_id"]
    logprobs = {int(position): row for position, row in served["logprobs"].items()}
    return Outcome(theirs, ids=served["ids"], end_ids=ends, logprobs=logprobs)
