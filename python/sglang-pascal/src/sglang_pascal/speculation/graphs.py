"""Recorded steps (CUDA graphs) for each number of rows that a request may have in a step.

SGLang records only the widest width; a step without drafts would then compute rows that nobody needs. Here the
platform's runner records width 1 for all batch sizes. Each further width has a runner of its own, for the batch sizes
whose rows fit into a step. A step uses the runner of its width.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from sglang.srt.model_executor.runner import decode_cuda_graph_runner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BATCH_SIZES: Final = "get_batch_sizes_to_capture"
"""SGLang's function for the batch sizes to record: `(model_runner, width, **) -> (sizes, sizes to compile)`."""


class ChainGraphRunner(decode_cuda_graph_runner.DecodeCudaGraphRunner):  # type: ignore[misc]  # no types in SGLang
    """SGLang's runner of recorded decode steps; the default width is 1."""

    def __init__(
        self, model_runner: Any, *, speculative_num_draft_tokens: int | None = None, most_rows: int = 0, **more: Any
    ) -> None:
        """most_rows: record only batch sizes with at most this many rows; 0 = all."""
        width = speculative_num_draft_tokens or (1 if model_runner.spec_algorithm.is_speculative() else None)
        sizes = getattr(decode_cuda_graph_runner, _BATCH_SIZES)

        def allowed(*arguments: Any, **options: Any) -> tuple[list[int], list[int]]:
            found, compiled = sizes(*arguments, **options)
            return sizes_of(found, width or 1, most_rows), sizes_of(compiled, width or 1, most_rows)

        with mock.patch.object(decode_cuda_graph_runner, _BATCH_SIZES, allowed):
            super().__init__(model_runner, speculative_num_draft_tokens=width, **more)


def sizes_of(sizes: Sequence[int], width: int, most_rows: int) -> list[int]:
    """Return the batch sizes with at most most_rows rows, if each request has `width` rows. most_rows 0: all sizes."""
    return [size for size in sizes if not most_rows or size * width <= most_rows]


class RecordedWidths:
    """A model's runners by width, and the widths that a batch may have."""

    def __init__(self, model_runner: Any, widths: Sequence[int], most_rows: int) -> None:
        """widths: ascending, from 1. most_rows: most rows of one step, all requests together."""
        self._model_runner, self._widths, self._most_rows = model_runner, tuple(widths), most_rows
        self._runners: dict[int, Any] = {}

    def record(self) -> None:
        """Record each width above 1 that one request may have; nothing if SGLang records no steps."""
        base = self._model_runner.decode_cuda_graph_runner
        if base is None:
            return
        self._runners = {1: base}
        for width in self._widths[1:]:
            if sizes_of(base.capture_bs, width, self._most_rows):
                self._runners[width] = ChainGraphRunner(
                    self._model_runner, speculative_num_draft_tokens=width, most_rows=self._most_rows
                )

    def widths(self, n: int) -> list[int]:
        """Return the widths that a batch of n requests may have: all, or those whose steps are recorded."""
        if not self._runners:
            return [width for width in self._widths if width == 1 or n * width <= self._most_rows]
        return [width for width, runner in self._runners.items() if width == 1 or n <= runner.max_bs]

    @contextlib.contextmanager
    def of_width(self, width: int) -> Iterator[None]:
        """Let SGLang run a step of that width. A step that is not recorded runs operation by operation."""
        before = self._model_runner.decode_cuda_graph_runner
        if self._runners:
            self._model_runner.decode_cuda_graph_runner = self._runners[width]
        try:
            yield
        finally:
            self._model_runner.decode_cuda_graph_runner = before
