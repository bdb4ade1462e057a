"""The quality of each type of weights: llama-perplexity scores its file on one text against the most precise one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import as_file
from typing import TYPE_CHECKING

from pascaline.bench import llama_tools
from pascaline.bench.quant_files import REFERENCE_TYPE
from pascaline.bench.workload import SHIPPED_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pascaline.bench.progress import Progress
    from pascaline.bench.quant_files import TypeFiles

SCORES_NAME = "reference.kld"
PURPOSE = "measuring quality"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityScorer:
    """Scores files, and keeps the probabilities of the reference."""

    files: TypeFiles
    folder: Path
    """Folder of the results; the reference's probabilities are kept there."""
    chunks: int
    """Number of chunks, each of llama_tools.WINDOW_TOKENS tokens of the shipped text."""
    on_gpu: bool
    progress: Progress

    @property
    def scores(self) -> Path:
        """The file with the reference's probabilities."""
        return self.folder / SCORES_NAME

    @property
    def note(self) -> str:
        """What the scores measure, for the reader of the results."""
        spec, is_precise = self.files.spec, self.files.source_is_precise
        text = f"{self.chunks} chunks of {llama_tools.WINDOW_TOKENS} tokens of chapters of "
        text += "Alice's Adventures in Wonderland (shipped with pascaline); KL divergence in nats per token from "
        text += f"{spec.file_type if is_precise else REFERENCE_TYPE}."
        if spec.format == "gguf" and not is_precise:
            text += f" The source is {spec.file_type} already: F16 is that file's weights, not the original's."
        return text

    def require_space(self) -> None:
        """Raise StorageError without room for the reference's probabilities and, if it is to be made, its file."""
        if self.scores.exists():
            return
        scores, file = self._scores_bytes(), self.files.reference_bytes
        # The conversion of a folder lies beside the file that is made from it.
        needed = file + max(scores, file if self.files.spec.format == "safetensors" else 0)
        llama_tools.check_space(self.folder, needed, PURPOSE)

    def score(self, kind: str, model: Path) -> dict[str, float]:
        """Return perplexity, KL divergence and the share of equal top tokens of a file of this type."""
        with as_file(SHIPPED_TEXT) as text:
            return self._score(kind, model, text)

    def _score(self, kind: str, model: Path, text: Path) -> dict[str, float]:
        scoring = llama_tools.Scoring(
            text=text,
            chunks=self.chunks,
            on_gpu=self.on_gpu,
            threads=len(os.sched_getaffinity(0)),
            tools=self.files.tools,
        )

        def on_chunk(done: int) -> None:
            self.progress.running(f"{kind}: quality, chunk {done} of {self.chunks}", done / self.chunks)

        if not self.scores.exists():
            self._score_reference(scoring, on_chunk)
        found = llama_tools.score(model, scoring, self.scores, on_chunk)
        shown = f"perplexity {found['perplexity']:.3f}, mean KL {found['kl_mean']:.5f}"
        self.progress.say(f"{kind}: {shown}, same top token {found['same_top']:.2%}")
        return found

    def _score_reference(self, scoring: llama_tools.Scoring, on_chunk: Callable[[int], None]) -> None:
        llama_tools.check_space(self.folder, self._scores_bytes(), PURPOSE)
        partial = self.scores.with_suffix(".partial")
        llama_tools.score_reference(self.files.precise(), scoring, partial, on_chunk)
        partial.replace(self.scores)

    def _scores_bytes(self) -> int:
        return llama_tools.reference_bytes(self.chunks, self.files.spec.vocab_size)
